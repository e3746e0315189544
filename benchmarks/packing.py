"""Packing short documents: padding saved, what attention inside documents costs, tokens a second.

Run from the repository root: python benchmarks/packing.py
Times are the best of 5 alternating passes: what else runs on the machine only makes them longer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.index import Corpus
from data.inputs import documents
from data.loader import load
from data.packing import PackedStreams
from data.shards import write_corpus
from data.streams import IGNORE, Int64Array, Streams
from data.tokenizer import ByteTokenizer
from model.attention import Alone, Whole
from model.config import FamMemory, ModelConfig
from model.decoder import Decoder
from model.fold import fold
from model.init import initialise
from model.packed import Packed

PASSES = 5


def corpora() -> dict[str, Int64Array]:
    """Return lengths of documents: two made up, as of web pages, and one real."""
    random = np.random.default_rng(0)
    pages = {
        "log-normal, median 500, sigma 1": random.lognormal(np.log(500), 1.0, 100_000),
        "log-normal, median 660, sigma 1.4": random.lognormal(np.log(660), 1.4, 100_000),
    }
    found = {name: np.maximum(2, lengths).astype(np.int64) for name, lengths in pages.items()}
    files = [len(document.text.encode()) // 4 + 1 for document in documents(["stdlib"])]
    return found | {"Python's standard library, bytes / 4": np.array(files, dtype=np.int64)}


def measure_padding() -> None:
    """Print which share of a step's positions is padding."""
    print("| documents | mean tokens | S | padding | packed | segments | packed | pack, s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, lengths in corpora().items():
        for size in (1024, 4096, 16384):
            begin = time.perf_counter()
            packed = PackedStreams(lengths, seed=0, lanes=1, segment_len=size, segments=1)
            seconds = time.perf_counter() - begin
            plain = Streams(lengths, seed=0, lanes=1, segment_len=size, segments=1)
            waste = [1 - lengths.sum() / (s.total_segments * size) for s in (plain, packed)]
            print(
                f"| {name} | {lengths.mean():.0f} | {size} | {waste[0]:.1%} | {waste[1]:.1%}"
                f" | {plain.total_segments} | {packed.total_segments} | {seconds:.2f} |"
            )


def best(ways: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the shortest time of each, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + PASSES):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: min(found[1:]) for name, found in times.items()}


def equal_documents(segments: int, size: int, count: int) -> Tensor:
    """Return the documents [1, segments, S] of segments that each hold `count` of equal length."""
    return (torch.arange(size) * count // size).expand(1, segments, size).contiguous()


def masked(ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with a mask of documents, as torch has it: [B * N, H, S, K]."""
    same = ids[0].unsqueeze(-1) == ids[0].unsqueeze(-2)
    mask = same.tril().unsqueeze(1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def measure_attention(device: torch.device, segments: int, size: int) -> None:
    """Print milliseconds of attention, forward and backward, by documents in a segment."""
    heads, width = 8, 64
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, segments, size, heads, width)
    q, k, v, up = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))

    def run(ids: Tensor | None) -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        packed = None if ids is None else Packed(ids, torch.arange(size), device)
        out = fold(*leaves, layout=Whole(), exchange=Alone(), packed=packed)
        torch.autograd.grad(out, leaves, up)

    def run_masked(ids: Tensor) -> None:
        leaves = [x.detach()[0].transpose(1, 2).requires_grad_() for x in (q, k, v)]
        out = masked(ids.to(device), *leaves)
        torch.autograd.grad(out, leaves, up[0].transpose(1, 2))

    print(f"\n| {segments} segments of {size}, 8 heads of 64, {device.type} | ms |")
    print("|---|---|")
    ways: dict[str, Callable[[], None]] = {"whole segments (no documents)": lambda: run(None)}
    for count in (1, 4, 16, 64, 256):
        ids = equal_documents(segments, size, count)
        ways[f"{count} documents of {size // count}"] = lambda ids=ids: run(ids)  # type: ignore[misc]
    ids = equal_documents(segments, size, 4)
    ways["the same 4, by a mask in torch's attention"] = lambda: run_masked(ids)
    for name, seconds in best(ways).items():
        print(f"| {name} | {1e3 * seconds:.1f} |")


def measure_steps(folder: Path) -> None:
    """Print targets a second of forward and backward, each document alone or packed."""
    size, segments = 512, 8
    random = np.random.default_rng(0)
    texts = [
        random.integers(0, 256, int(length), dtype=np.uint16)
        for length in np.maximum(2, random.lognormal(np.log(125), 1.0, 2000))
    ]
    write_corpus(folder, texts, tokenizer=ByteTokenizer())
    corpus = Corpus.open(folder)
    config = ModelConfig(512, 4, 128, 4, 2, 384, 32, memory=FamMemory(slots=8, window=1))
    model = Decoder(config)
    initialise(model, config, seed=0)
    targets: dict[str, int] = {}

    def way(name: str, kind: type[Streams]) -> Callable[[], None]:
        streams = kind(corpus.lengths, seed=0, lanes=1, segment_len=size, segments=segments)
        steps = load(corpus, streams, position=0, dp_rank=0, dp_size=1, micro_batch=1, workers=0)

        def step() -> None:
            (batch,) = next(steps)
            output = model(
                batch.tokens,
                batch.starts,
                labels=batch.labels,
                scale=torch.tensor(1e-3),
                documents=batch.documents,
            )
            output.loss.backward()
            targets[name] = targets.get(name, 0) + int((batch.labels != IGNORE).sum())

        return step

    names = {"a segment each": Streams, "packed": PackedStreams}
    seconds = best({name: way(name, kind) for name, kind in names.items()})
    mean = corpus.lengths.mean()
    print(f"\n| fam, 4 layers of 128, 8 segments of 512, documents of {mean:.0f} | s | targets/s |")
    print("|---|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {found:.2f} | {targets[name] / (1 + PASSES) / found:.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--segment-len", type=int, default=4096)
    chosen = parser.parse_args()
    measure_padding()
    on_gpu = torch.cuda.is_available()
    measure_attention(
        torch.device("cuda" if on_gpu else "cpu"), chosen.segments, chosen.segment_len
    )
    with tempfile.TemporaryDirectory() as scratch:
        measure_steps(Path(scratch) / "shards")
