"""N segments in one forward against one after another, and what the memory costs of a step.

    python benchmarks/segments.py [--memories "fam;infini"] [--segment 512] [--rounds 5]

The model of benchmarks/length.py; 16 segments of one document, forward and backward with
gradients through all of them, CPU seconds of one thread, medians of alternating rounds. "in turn":
one segment a forward, each from the state that the one before left, one backward at the end: the
same gradients. "none": the same model without a memory, all at once. "armt, diagonals": with
train.wavefront.
"""

from __future__ import annotations

import argparse
import functools
import time
from statistics import median

import torch

from benchmarks.length import MEMORIES, SEGMENT, Reader
from data.streams import Batch
from model.config import ComputeConfig, NoMemory

COUNT = 16
DIAGONALS = "armt, diagonals"


def at_once(reader: Reader, batch: Batch) -> None:
    """Train on all segments in one forward."""
    scale = torch.tensor(1 / batch.labels.numel())
    reader.model(batch.tokens, batch.starts, labels=batch.labels, scale=scale).loss.backward()
    reader.model.zero_grad()


def in_turn(reader: Reader, batch: Batch) -> None:
    """Train on the same, one forward a segment."""
    scale = torch.tensor(1 / batch.labels.numel())
    loss, state = torch.zeros(()), None
    for n in range(batch.tokens.shape[1]):
        part = slice(n, n + 1)
        output = reader.model(
            batch.tokens[:, part],
            batch.starts[:, part],
            state,
            labels=batch.labels[:, part],
            scale=scale,
        )
        loss, state = loss + output.loss, output.state
    loss.backward()
    reader.model.zero_grad()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--memories", default=";".join([*MEMORIES, DIAGONALS]), help="NAME;NAME;..."
    )
    parser.add_argument("--segment", type=int, default=SEGMENT)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{COUNT} segments of {options.segment} tokens\n")
    print("| memory | at once, s | in turn, s | gain | none, s | cost of the memory |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    plain = Reader(NoMemory(), options.segment)
    for name in options.memories.split(";"):
        compute = ComputeConfig(wavefront=name == DIAGONALS)
        memory = MEMORIES["armt" if compute.wavefront else name]
        reader = Reader(memory, options.segment, compute)
        batch, bare = (each.batch(COUNT, start=True) for each in (reader, plain))
        ways = {
            "at once": functools.partial(at_once, reader, batch),
            "in turn": functools.partial(in_turn, reader, batch),
            "none": functools.partial(at_once, plain, bare),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds + 1):
            for way, run in ways.items():
                began = time.process_time()
                run()
                seconds[way].append(time.process_time() - began)
        once, turn, none = (median(found[1:]) for found in seconds.values())
        print(
            f"| {name} | {once:.2f} | {turn:.2f} | {turn / once:.2f} | {none:.2f}"
            f" | {once / none - 1:+.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
