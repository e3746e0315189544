"""What the data ledger costs a step: one markdown table.

Run from the repository root: python benchmarks/ledger.py [FOLDER]
Wall time of a rank, medians; FOLDER is where the ledger is written (default: a temporary one), so
name one on the file system of your runs. The last column is the speed of a rank at which writing
the ledger would take 1 % of its step.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from data.ledger import Header, Ledger, record_dtype
from data.streams import Batch

SEGMENT_LEN, SEGMENTS, STEPS = 2048, 16, 300


def make_batch(position: int) -> Batch:
    """Return one sample of 32k random tokens."""
    shape = (1, SEGMENTS, SEGMENT_LEN)
    tokens = torch.from_numpy(np.random.default_rng(position).integers(0, 50000, shape))
    labels = tokens.roll(-1, dims=2)
    starts = torch.zeros(shape[:2], dtype=torch.bool)
    return Batch(tokens, labels, starts, torch.zeros(shape[:2], dtype=torch.int64), position)


def measure(folder: Path, samples: int) -> str:
    """Return the row of a rank with so many samples a step."""
    batches = [make_batch(position) for position in range(samples)]
    ledger = Ledger(folder, Header(samples, 0, 1, 0, samples, samples, {}))
    times, syncs = [], []
    for step in range(STEPS):
        began = time.perf_counter()
        ledger.append(batches)
        times.append(time.perf_counter() - began)
        if step % 30 == 29:
            began = time.perf_counter()
            ledger.sync()
            syncs.append(time.perf_counter() - began)
    ledger.close()
    seconds = statistics.median(times)
    rate = samples * SEGMENTS * SEGMENT_LEN / (100 * seconds)
    return (
        f"| {samples} | {seconds * 1e6:.0f} | {statistics.median(syncs) * 1e3:.1f} |"
        f" {record_dtype(samples).itemsize} | {rate / 1e6:.1f}M |"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as scratch:
        print("| samples a step | us a step | fsync, ms | bytes a step | tokens/s for 1 % |")
        print("|---|---|---|---|---|")
        for count in (1, 4, 16):
            print(measure(Path(scratch), count))
