"""What a memory leaves of the ring's gain: forward and backward of a model over ranks and in one.

    python -m benchmarks.ring_memories [--cp 2] [--memories "fam;infini"] [--segment 4096]
        [--rounds 3]

The model of benchmarks/length.py, two segments of one document, so that the second reads what the
first left; over the ranks by ring and zigzag, one thread a process. Wall time, medians of
alternating rounds; gradients compared with one process's. "of none": with the memory over without,
on as many processes. "gain": one process over all ranks. The sum of gradients over ranks, which is
ZeRO's, is not in it. Landmark has a window in place of its retrieval, which takes no CP.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks.length import MEMORIES, Reader
from benchmarks.ring import join, start
from model.config import LandmarkMemory, MemoryConfig, NoMemory
from model.decoder import Decoder
from model.local import FoldedSequence
from parallel.ring import choose_exchange
from parallel.slicing import choose_layout, take_slice

SEGMENTS = 2
RING = MEMORIES | {"none": NoMemory(), "landmark": LandmarkMemory(65, window=1)}


class Way(NamedTuple):
    """A model, and a call that leaves its gradients."""

    model: Decoder
    run: Callable[[], None]


def prepare(memory: MemoryConfig, sequence: FoldedSequence, segment: int) -> Way:
    """Return this rank's model and its slice of the document: the same in every layout."""
    reader = Reader(memory, segment, sequence=sequence)
    batch = reader.batch(SEGMENTS, start=True)
    scale = torch.tensor(1 / batch.labels.numel())
    tokens, labels = (
        take_slice(x, sequence.layout, sequence.rank) for x in (batch.tokens, batch.labels)
    )

    def run() -> None:
        reader.model.zero_grad()
        reader.model(tokens, batch.starts, labels=labels, scale=scale).loss.backward()

    return Way(reader.model, run)


def measure(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Run on each process: time every memory in alternation; rank 0 prints."""
    join(rank, options.cp, folder)
    assert dist.group.WORLD is not None
    exchange = choose_exchange("ring", dist.group.WORLD)
    ring = FoldedSequence(choose_layout("zigzag", options.cp), exchange)
    names = ["none", *options.memories.split(";")]
    alone, ranks = (
        {name: prepare(RING[name], sequence, options.segment) for name in names}
        for sequence in (FoldedSequence(), ring)
    )
    took: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for turn in range(options.rounds + 1):
        for name in names:
            for way, seconds in zip((alone[name], ranks[name]), took[name], strict=True):
                dist.barrier()
                begin = time.perf_counter()
                if rank == 0 or way is ranks[name]:
                    way.run()
                dist.barrier()
                if turn:
                    seconds.append(time.perf_counter() - begin)
            if turn == 0:
                check(name, alone[name].model, ranks[name].model)
    if rank == 0:
        show({name: (median(one), median(all_)) for name, (one, all_) in took.items()}, options)
    dist.destroy_process_group()


def check(name: str, alone: Decoder, ranks: Decoder) -> None:
    """Raise where the ranks' gradients do not add up to one process's."""
    apart, size = torch.zeros(()), torch.zeros(())
    for one, part in zip(alone.parameters(), ranks.parameters(), strict=True):
        total = torch.zeros_like(part) if part.grad is None else part.grad.clone()
        dist.all_reduce(total)
        expected = torch.zeros_like(total) if one.grad is None else one.grad
        apart += (total - expected).square().sum()
        size += expected.square().sum()
    error = (apart / size).sqrt()
    assert dist.get_rank() or error < 1e-3, (name, error)  # rank 0 alone has both


def show(took: dict[str, tuple[float, float]], options: argparse.Namespace) -> None:
    """Print the table."""
    tokens, cores = f"{SEGMENTS} segments of {options.segment} tokens", os.cpu_count()
    print(f"{tokens}, {options.cp} processes on {cores} cores\n")
    print(f"| memory | one process, s | of none | {options.cp} processes, s | of none | gain |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (one, all_) in took.items():
        more, more_of_all = one / took["none"][0], all_ / took["none"][1]
        print(f"| {name} | {one:.2f} | {more:.2f} | {all_:.2f} | {more_of_all:.2f} ", end="")
        print(f"| {one / all_:.2f} |")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cp", type=int, choices=(2, 4), default=2)
    parser.add_argument("--memories", default=";".join(MEMORIES), help="NAME;NAME;...")
    parser.add_argument("--segment", type=int, default=4096, help="of 128 * cp, for landmark")
    parser.add_argument("--rounds", type=int, default=3)
    start(measure, parser.parse_args())


if __name__ == "__main__":
    main()
