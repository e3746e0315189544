"""What a large corpus costs before and between batches, shuffled whole or in windows: a table.

Run from the repository root: python benchmarks/shuffle.py [DOCUMENTS ...]
The corpora are real but for their tokens, which are zeros in sparse files: manifest, indices and
crc32 are read and verified as ever. Each row is a process of its own; memory is its peak above
what it held before the corpus was opened.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import zlib
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil

from data.counts import counts_file, read_counts, write_counts
from data.durable import write_atomically
from data.index import Corpus
from data.loader import load
from data.mixture import plan
from data.shards import INDEX_DTYPE, INDEX_SUFFIX, TOKENIZER, Manifest, Shard
from data.streams import Streams
from data.tokenizer import ByteTokenizer
from data.wide import WideCorpus

DOCUMENTS = (100_000, 1_000_000, 10_000_000, 100_000_000)
# More of them need gigabytes without windows: that is what windows are for.
ALL_UP_TO = 10_000_000
IN_SHARD = 5000
LANES, SEGMENT_LEN, SEGMENTS, STEPS, SHARDS = 8, 2048, 4, 50, 8


def write_corpus(folder: Path, documents: int) -> None:
    """Write shards of IN_SHARD documents of 512 to 8192 zeros, 2k on average."""
    folder.mkdir()
    random = np.random.default_rng(0)
    sizes = np.unique(np.geomspace(512, 8192, 64).astype(np.int64))
    checks = np.array([zlib.crc32(bytes(2 * int(size))) for size in sizes], dtype=np.uint32)
    shards = []
    for number in range(documents // IN_SHARD):
        chosen = random.integers(0, len(sizes), IN_SHARD)
        rows = np.zeros(IN_SHARD, dtype=INDEX_DTYPE)
        rows["length"], rows["crc32"] = sizes[chosen], checks[chosen]
        ends = np.cumsum(512 + -(-2 * sizes[chosen] // 512) * 512)
        rows["offset"] = np.concatenate([[0], ends[:-1]]) + 512
        index = BytesIO()
        np.save(index, rows)
        name = f"shard-{number:06d}.tar"
        (folder / (name + INDEX_SUFFIX)).write_bytes(index.getvalue())
        with (folder / name).open("wb") as stream:
            stream.truncate(int(ends[-1]) + 1024)
        tokens, size = int(rows["length"].sum()), int(ends[-1]) + 1024
        hashed = sha256(index.getvalue()).hexdigest()
        shards.append(Shard(name, IN_SHARD, tokens, size, "0" * 64, hashed))
    tokenizer = ByteTokenizer()
    write_atomically(folder / TOKENIZER, tokenizer.to_json().encode())
    Manifest.of(tokenizer, shards).write(folder)


def measure(folder: Path, shards: int | None, *, position: int) -> dict[str, float]:
    """Return seconds and MiB of opening, the first batch and the steps after it."""
    process = psutil.Process()
    import torch  # noqa: F401  (not part of what is measured)

    before, began = process.memory_info().rss, time.perf_counter()
    counts = None
    if shards is None:
        corpus: Corpus | WideCorpus = Corpus.open(folder)
    else:
        corpus = WideCorpus.open(folder)
        corpus.check()
        path = counts_file(folder, corpus, SEGMENT_LEN)
        found = read_counts(path, corpus, SEGMENT_LEN)
        if found is None:
            found = corpus.scan(SEGMENT_LEN)
            write_counts(path, corpus, SEGMENT_LEN, found)
        counts = [found]
    order, _ = plan(corpus, counts, seed=0, segment_len=SEGMENT_LEN, shuffle_shards=shards)
    streams = Streams.over(order, lanes=LANES, segments=SEGMENTS)
    opened = time.perf_counter()
    steps = load(
        corpus,
        streams,
        position=position * LANES,
        dp_rank=0,
        dp_size=1,
        micro_batch=LANES,
        workers=0,
    )
    next(steps)
    first = time.perf_counter()
    for _ in range(STEPS):
        next(steps)
    ended = time.perf_counter()
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "open": opened - began,
        "batch": first - opened,
        "step": (ended - first) / STEPS,
        "memory": (peak * 1024 - before) / (1 << 20),
    }


def row(documents: int, name: str, folder: Path, shards: int | None, position: int) -> None:
    """Print one line of the table, measured in a new process."""
    command = [sys.executable, __file__, "--measure", str(folder), str(shards or 0), str(position)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    print(
        f"| {documents:,} | {name} | {found['open']:.2f} s | {1e3 * found['batch']:.0f} ms"
        f" | {1e3 * found['step']:.1f} ms | {found['memory']:.0f} MiB |",
        flush=True,
    )


def main(sizes: list[int]) -> None:
    """Print the table."""
    print("| documents | order | open | first batch | a step after it | memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for documents in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "shards"
            write_corpus(folder, documents)
            if documents <= ALL_UP_TO:
                row(documents, "all shuffled", folder, None, 0)
            windows = f"windows of {SHARDS} shards"
            row(documents, f"{windows}, first start (counts)", folder, SHARDS, 0)
            row(documents, windows, folder, SHARDS, 0)
            row(documents, f"{windows}, at step 1,000,003", folder, SHARDS, 1_000_003)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        found = measure(Path(sys.argv[2]), int(sys.argv[3]) or None, position=int(sys.argv[4]))
        print(json.dumps(found))
    else:
        main([int(text) for text in sys.argv[1:]] or list(DOCUMENTS))
