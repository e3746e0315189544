"""The loader against plain webdataset on the same shards, and prepare: one markdown table.

Run from the repository root: python benchmarks/data_loader.py
CPU seconds of one core (process time), medians of 5 alternating passes over all tokens; for
prepare one pass, CPU seconds of all its processes and wall time.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.index import Corpus
from data.inputs import documents
from data.loader import load
from data.prepare import prepare
from data.shards import write_corpus
from data.streams import Streams
from data.tokenizer import ByteTokenizer, Tokenizer, train_tokenizer

DOCUMENTS, DOCUMENT_LEN, PASSES = 1024, 32768, 5


def write_shards(folder: Path) -> Corpus:
    """Return a corpus of 33.5M random bytes in documents of 32k tokens."""
    random = np.random.default_rng(0)
    texts = (random.integers(0, 256, DOCUMENT_LEN - 1, dtype=np.uint16) for _ in range(DOCUMENTS))
    write_corpus(folder, texts, tokenizer=ByteTokenizer(), shard_tokens=1 << 22)
    return Corpus.open(folder)


def read_webdataset(corpus: Corpus) -> int:
    """Read every document as an int64 tensor, as a user of webdataset would."""
    import torch  # not above: the workers of prepare import this file again
    import webdataset as wds

    shards = [str(corpus.folder / shard.name) for shard in corpus.manifest.shards]
    tokens = 0
    for sample in wds.WebDataset(shards, shardshuffle=False, empty_check=False):
        stored = np.frombuffer(sample["tokens.bin"], dtype="<u2")
        tokens += torch.from_numpy(stored.astype(np.int64)).numel()
    return tokens


def read_loader(
    corpus: Corpus, segment_len: int, segments: int, *, fresh: bool, workers: int = 0
) -> Callable[[], int]:
    """Return a pass of the loader; a fresh corpus verifies every crc32 again."""

    def read() -> int:
        opened = Corpus.open(corpus.folder) if fresh else corpus
        streams = Streams(
            opened.lengths, seed=0, lanes=8, segment_len=segment_len, segments=segments
        )
        steps = load(
            opened,
            streams,
            position=0,
            dp_rank=0,
            dp_size=1,
            micro_batch=1,
            workers=workers,
            steps=streams.steps_per_epoch,
        )
        for batches in steps:
            assert len(batches) == 8
        return int(opened.lengths.sum())

    return read


def measure_loaders(folder: Path) -> None:
    """Print Mtok/s per core for each way to read the same shards."""
    corpus = write_shards(folder)
    ways = {
        "webdataset, documents as int64 (no labels, fixed order, no crc)": lambda: read_webdataset(
            corpus
        ),
        "longhaul, S=2048 N=16, first epoch (crc32)": read_loader(corpus, 2048, 16, fresh=True),
        "longhaul, S=2048 N=16, later epochs": read_loader(corpus, 2048, 16, fresh=False),
        "longhaul, S=2048 N=1, later epochs": read_loader(corpus, 2048, 1, fresh=False),
        "longhaul, S=2048 N=16, later epochs, 1 thread": read_loader(
            corpus, 2048, 16, fresh=False, workers=1
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for read in ways.values():
        read()
    for _ in range(PASSES):
        for name, read in ways.items():
            begin = time.process_time()
            tokens = read()
            speeds[name].append(tokens / (time.process_time() - begin) / 1e6)
    print(f"| {DOCUMENTS} documents of {DOCUMENT_LEN} tokens, uint16 | Mtok/s per core |")
    print("|---|---|")
    for name, found in speeds.items():
        print(f"| {name} | {statistics.median(found):.0f} |")


def measure_prepare(folder: Path) -> None:
    """Print MB/s of prepare on the standard library, with bytes and with an 8k BPE."""
    sample = (document.text[:60000] for document in documents(["stdlib"]))
    trained = train_tokenizer(sample, vocab_size=8192)
    print("\n| prepare, Python standard library | MB/s per core (CPU) | MB/s (wall) |")
    print("|---|---|---|")
    tokenizers: list[Tokenizer] = [ByteTokenizer(), trained]
    for tokenizer in tokenizers:
        for workers in (1, len(os.sched_getaffinity(0))):
            output = folder / f"{tokenizer.name}-{workers}"
            cpu, wall = sum(os.times()[:4]), time.perf_counter()
            made = prepare(["stdlib"], output, tokenizer=tokenizer, workers=workers, progress=False)
            cpu, wall = sum(os.times()[:4]) - cpu, time.perf_counter() - wall
            size = made.input_bytes / 1e6
            name = f"{tokenizer.name}, {workers} worker{'s' * (workers > 1)}"
            print(f"| {name} | {size / cpu:.1f} | {size / wall:.1f} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        measure_loaders(Path(scratch) / "shards")
        measure_prepare(Path(scratch))
