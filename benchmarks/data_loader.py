"""The loader against plain webdataset and a numpy memory map on the same tokens, and prepare.

    python -m benchmarks.data_loader [--only loader|prepare] [--text PATH ...]

CPU seconds of one core (process time), medians of 5 alternating passes over all tokens, the heap
settled as in a run; what a resumed run waits for its first step, wall time. prepare: CPU seconds of
all its processes, their start included, and wall time, medians of 5 passes over --text (files,
folders, or the word stdlib), else over 16 MB of made-up words.
"""

from __future__ import annotations

import argparse
import os
import random
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
from data.streams import IGNORE, Streams
from data.tokenizer import ByteTokenizer, Tokenizer, train_tokenizer
from parallel.heap import settle_heap

DOCUMENTS, DOCUMENT_LEN, PASSES = 1024, 32768, 5


def write_shards(folder: Path) -> Corpus:
    """Return a corpus of 33.5M random bytes in documents of 32k tokens."""
    random = np.random.default_rng(0)
    texts = (random.integers(0, 256, DOCUMENT_LEN - 1, dtype=np.uint16) for _ in range(DOCUMENTS))
    write_corpus(folder, texts, tokenizer=ByteTokenizer(), shard_tokens=1 << 22)
    return Corpus.open(folder)


def read_webdataset(corpus: Corpus, step: int | None = None) -> int:
    """Read every document as an int64 tensor, as a user of webdataset would.

    step: so many documents are kept together, with labels, as one step of a training takes them.
    """
    import torch  # not above: the workers of prepare import this file again
    import webdataset as wds

    shards = [str(corpus.folder / shard.name) for shard in corpus.manifest.shards]
    tokens, batch = 0, []
    for sample in wds.WebDataset(shards, shardshuffle=False, empty_check=False):
        stored = np.frombuffer(sample["tokens.bin"], dtype="<u2")
        read = torch.from_numpy(stored.astype(np.int64))
        tokens += read.numel()
        if step is None:
            continue
        labels = torch.empty_like(read)
        labels[:-1], labels[-1] = read[1:], IGNORE
        batch.append((read, labels))
        if len(batch) == step:
            batch = []
    return tokens


def read_memory_map(path: Path) -> int:
    """Read a file of nothing but tokens in shuffled windows of a document's length, as int64."""
    import torch

    stored = np.memmap(path, dtype="<u2", mode="r").reshape(-1, DOCUMENT_LEN)
    order = np.random.default_rng(0).permutation(len(stored))
    return sum(torch.from_numpy(stored[place].astype(np.int64)).numel() for place in order)


def resume(corpus: Corpus, workers: int) -> float:
    """Return the ms from opening the corpus to the first step of a run in its third epoch."""
    begin = time.perf_counter()
    opened = Corpus.open(corpus.folder)
    streams = Streams(opened.lengths, seed=0, lanes=8, segment_len=2048, segments=16)
    position = 8 * (2 * streams.steps_per_epoch + streams.steps_per_epoch // 2)
    steps = load(
        opened, streams, position=position, dp_rank=0, dp_size=1, micro_batch=1, workers=workers
    )
    next(steps)
    taken = time.perf_counter() - begin
    steps.close()
    return taken * 1000


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
    every = range(corpus.documents)
    flat = folder.with_name("tokens.bin")
    flat.write_bytes(b"".join(corpus.read_stored(n, 0, DOCUMENT_LEN).tobytes() for n in every))
    ways = {
        "webdataset, documents as int64 (no labels, fixed order, no crc)": lambda: read_webdataset(
            corpus
        ),
        "webdataset, the same with labels, 8 documents a step": lambda: read_webdataset(corpus, 8),
        "numpy memory map, windows of 32k as int64 (no labels, documents or crc)": lambda: (
            read_memory_map(flat)
        ),
        "longhaul, S=2048 N=16, first epoch (crc32)": read_loader(corpus, 2048, 16, fresh=True),
        "longhaul, S=2048 N=16, later epochs": read_loader(corpus, 2048, 16, fresh=False),
        "longhaul, S=2048 N=1, later epochs": read_loader(corpus, 2048, 1, fresh=False),
        "longhaul, S=2048 N=16, later epochs, 1 thread": read_loader(
            corpus, 2048, 16, fresh=False, workers=1
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    # Freed once, it stops glibc from handing every few hundred kB back to the kernel: in a training
    # process the first activations do so.
    np.empty(31 << 20, dtype=np.uint8)
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
    print("\n| first step of a resumed run: 8 x 32k tokens | ms |\n|---|---|")
    for workers in (0, 1):
        found = [resume(corpus, workers) for _ in range(PASSES)]
        print(f"| {workers} threads | {statistics.median(found):.0f} |")


def write_texts(folder: Path) -> Path:
    """Return a folder of 128 documents of 128 kB: made-up words, a few of them most of the time."""
    source = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(20000)]
    shares = [1 / rank for rank in range(1, len(words) + 1)]
    folder.mkdir()
    for number in range(128):
        text = " ".join(source.choices(words, shares, k=24000))[: 128 << 10]
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def measure_prepare(folder: Path, inputs: list[str]) -> None:
    """Print the speed of prepare, with bytes and with an 8k BPE."""
    sample = (document.text[:60000] for document in documents(inputs))
    tokenizers: list[Tokenizer] = [ByteTokenizer(), train_tokenizer(sample, vocab_size=8192)]
    print("\n| prepare | tokens/s per core | MB/s per core (CPU) | MB/s (wall) |")
    print("|---|---|---|---|")
    for tokenizer in tokenizers:
        for workers in (1, len(os.sched_getaffinity(0))):
            speeds = [one_prepare(folder, inputs, tokenizer, workers) for _ in range(PASSES)]
            tokens, cpu, wall = (statistics.median(found) for found in zip(*speeds, strict=True))
            name = f"{tokenizer.name}, {workers} worker{'s' * (workers > 1)}"
            print(f"| {name} | {tokens:,.0f} | {cpu:.1f} | {wall:.1f} |", flush=True)


def one_prepare(
    folder: Path, inputs: list[str], tokenizer: Tokenizer, workers: int
) -> tuple[float, float, float]:
    """Return tokens a CPU second, MB a CPU second, and MB a second of one pass."""
    output = folder / "prepared"
    cpu, wall = sum(os.times()[:4]), time.perf_counter()
    made = prepare(
        inputs,
        output,
        tokenizer=tokenizer,
        valid_fraction=0.0,
        workers=workers,
        progress=False,
        force=True,
    )
    cpu, wall = sum(os.times()[:4]) - cpu, time.perf_counter() - wall
    size = made.input_bytes / 1e6
    return made.train.tokens / cpu, size / cpu, size / wall


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["loader", "prepare"])
    parser.add_argument("--text", nargs="+", default=[])
    options = parser.parse_args()
    settle_heap()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.only != "prepare":
            measure_loaders(folder / "shards")
        if options.only != "loader":
            measure_prepare(folder, options.text or [str(write_texts(folder / "texts"))])


if __name__ == "__main__":
    main()
