"""Time and memory of a chunk as a document grows to a million tokens, for every memory.

    python -m benchmarks.length [--memories "fam;infini"] [--tokens 1048576] [--rounds 7]

4 layers of width 256, 4 query and 2 key heads, FFN 704, vocabulary 2048, float32, one thread,
segments of 512. One document is read chunk by chunk; what it left is kept at each length of the
table. From there, in alternation: the next chunk of 512 tokens with the logits of its last
(streaming), and a training window of 4 segments, forward and backward. CPU seconds, medians; and
the process's peak memory while it does the one and the other. The heap is settled as in a run.

Beside them transformers' LlamaForCausalLM of the same shape, the next chunk with a key-value cache
of that length (of random numbers), one length after the other.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data.landmarks import insert_landmarks
from data.streams import Batch
from model.config import (
    AbcMemory,
    ArmtMemory,
    CmabMemory,
    ComputeConfig,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    LandmarkMemory,
    MemoryConfig,
    ModelConfig,
    RmtMemory,
    WindowMemory,
)
from model.decoder import Decoder
from model.init import initialise
from model.interfaces import Sequence
from model.memory.base import Carried, detach, map_tensors
from model.memory.block_store import BlockStore
from parallel.heap import settle_heap

SEGMENT, WINDOW, VOCAB = 512, 4, 2048
LAYERS, WIDTH, HEADS, KEY_HEADS, FFN = 4, 256, 4, 2, 704
MEMORIES: dict[str, MemoryConfig] = {
    "window": WindowMemory(1),
    "fam": FamMemory(64, 1),
    "infini": InfiniMemory(),
    "infini, delta": InfiniMemory("delta"),
    "rmt": RmtMemory(16),
    "armt": ArmtMemory(16, 32),
    "hmt": HmtMemory(bank=300, sensory=32, search_dim=64),
    "abc": AbcMemory(64),
    "cmab": CmabMemory(64),
    "landmark": LandmarkMemory(65, retrieve=4, layers="last"),
}
PEER = "transformers, cache"
LENGTHS = [8192, 65536, 262144, 1048576]
Run = Callable[[], object]


class Reader:
    """A model that reads one document, and what it knows at each length."""

    def __init__(
        self,
        memory: MemoryConfig,
        segment: int = SEGMENT,
        compute: ComputeConfig | None = None,
        sequence: Sequence | None = None,
    ) -> None:
        self.segment = segment
        self.marked = isinstance(memory, LandmarkMemory)
        self.block = memory.block if isinstance(memory, LandmarkMemory) else 0
        config = ModelConfig(
            VOCAB + self.marked, LAYERS, WIDTH, HEADS, KEY_HEADS, FFN, WIDTH // HEADS, memory=memory
        )
        self.model = Decoder(config, sequence=sequence, compute=compute)
        initialise(self.model, config, 0)
        self.generator = torch.Generator().manual_seed(0)

    def batch(self, segments: int, *, start: bool) -> Batch:
        """Return the next tokens; with landmarks, segments are longer by theirs."""
        ids = torch.randint(0, VOCAB, (1, segments, self.segment), generator=self.generator)
        starts = torch.zeros(1, segments, dtype=torch.bool)
        starts[0, 0] = start
        offsets = torch.zeros(1, segments, dtype=torch.int64)
        batch = Batch(ids, ids.roll(-1, -1), starts, offsets, first_position=0)
        return insert_landmarks(batch, self.block, VOCAB) if self.marked else batch

    @torch.no_grad()
    def states(self, lengths: list[int]) -> dict[int, Carried]:
        """Read the document; return what it left at each length."""
        state, found = None, {}
        for count in range(1, lengths[-1] // SEGMENT + 1):
            batch = self.batch(1, start=state is None)
            state = self.model.read(batch.tokens, batch.starts, state)
            if count * SEGMENT in lengths:
                found[count * SEGMENT] = map_tensors(Tensor.clone, state)
        return found

    @torch.no_grad()
    def stream(self, state: Carried) -> None:
        """Read the next chunk, for the logits of its last token."""
        batch = self.batch(1, start=False)
        rewind(state)
        self.model(batch.tokens, batch.starts, state, only=-1)

    def train(self, state: Carried) -> None:
        """Go forward and backward through the next window of segments."""
        batch = self.batch(WINDOW, start=False)
        scale = torch.tensor(1 / (WINDOW * SEGMENT))
        rewind(state)
        output = self.model(
            batch.tokens, batch.starts, detach(state), labels=batch.labels, scale=scale
        )
        output.loss.backward()
        self.model.zero_grad()


def rewind(state: Carried) -> None:
    """Let what is read next behind this state be the first again: a document has no other.

    Who appends to a block store a second time copies all of it, as a fork of the stream must.
    """
    for layer in state.layers:
        for part in getattr(layer, "parts", {}).values():
            if isinstance(part, BlockStore):
                part.taken.copy_(part.end)


def size_of(state: Carried) -> int:
    """Return a state's bytes."""
    total = 0

    def add(x: Tensor) -> Tensor:
        nonlocal total
        total += x.numel() * x.element_size()
        return x

    map_tensors(add, state)
    return total


def alternate(runs: dict[int, Run], rounds: int) -> dict[int, float]:
    """Return the median CPU seconds of each; the first of each is not counted."""
    seconds: dict[int, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def peak(run: Run) -> float:
    """Return the MiB that the process holds at most during a run (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak before
    run()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def cached(lengths: list[int], rounds: int) -> tuple[dict[int, float], dict[int, float]]:
    """Return seconds and MiB of transformers' next chunk behind so many cached tokens."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, intermediate_size=FFN, vocab_size=VOCAB,
        max_position_embeddings=2 * lengths[-1], attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    seconds: dict[int, float] = {}
    peaks: dict[int, float] = {}
    for length in lengths:
        cache = DynamicCache()
        for layer in range(LAYERS):
            keys = torch.randn(1, KEY_HEADS, length, WIDTH // HEADS)
            cache.update(keys, torch.randn_like(keys), layer)

        @torch.no_grad()
        def run(cache: DynamicCache = cache) -> None:
            ids = torch.randint(0, VOCAB, (1, SEGMENT))
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.crop(-SEGMENT)

        seconds |= alternate({length: run}, rounds)
        peaks[length] = peak(run)
    return seconds, peaks


def row(name: str, kind: str, found: dict[int, float], sizes: tuple[float, float]) -> str:
    """Return a line of the table: a number at each length, with the ratio to the first's."""
    first = next(iter(found.values()))
    cells = [f"{each:,.1f} ({each / first:.2f})" for each in found.values()]
    return f"| {name} | {kind} | {' | '.join(cells)} | {sizes[0]:,.0f} to {sizes[1]:,.0f} |"


def milliseconds(seconds: dict[int, float]) -> dict[int, float]:
    """Return them in ms."""
    return {length: 1e3 * found for length, found in seconds.items()}


def measure(name: str, lengths: list[int], rounds: int) -> None:
    """Print a memory's lines, or the peer's."""
    if name == PEER:
        seconds, peaks = cached(lengths, rounds)
        token = 2 * LAYERS * KEY_HEADS * WIDTH // HEADS * 4 / 1e3
        sizes = (token * lengths[0], token * lengths[-1])
        print(row(name, "a chunk, ms", milliseconds(seconds), sizes))
        print(row(name, "a chunk, peak MiB", peaks, sizes))
        return
    reader = Reader(MEMORIES[name])
    states = reader.states(lengths)
    sizes = (size_of(states[lengths[0]]) / 1e3, size_of(states[lengths[-1]]) / 1e3)
    for kind, run in (("a chunk", reader.stream), ("4 segments, trained", reader.train)):
        runs: dict[int, Run] = {n: functools.partial(run, states[n]) for n in lengths}
        print(row(name, f"{kind}, ms", milliseconds(alternate(runs, rounds)), sizes))
        peaks = {n: peak(each) for n, each in runs.items()}
        print(row(name, f"{kind}, peak MiB", peaks, sizes))


def main() -> None:
    """Print the table, each memory's lines from a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memories", default=";".join([*MEMORIES, PEER]), help="NAME;NAME;...")
    parser.add_argument("--tokens", type=int, default=LENGTHS[-1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--alone", choices=[*MEMORIES, PEER], help=argparse.SUPPRESS)
    options = parser.parse_args()
    settle_heap()
    torch.set_num_threads(1)
    lengths = [length for length in LENGTHS if length <= options.tokens]
    if options.alone:
        measure(options.alone, lengths, options.rounds)
        return
    print(f"| memory | | {' | '.join(f'{n:,}' for n in lengths)} | state, kB |")
    print("| --- " * (len(lengths) + 3) + "|", flush=True)
    for name in options.memories.split(";"):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.length", *sys.argv[1:]]
        subprocess.run([*command, "--alone", name], check=True)


if __name__ == "__main__":
    main()
