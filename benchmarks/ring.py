"""Attention over the ranks of a ring beside one process: wall time of forward and backward.

    python -m benchmarks.ring [--cp 2] [--tokens 8192] [--precision fp32] [--rounds 5] [--compile]
                              [--rows "ring, zigzag;ring-flash-attention"]

8 query heads, 4 key heads of 64, one thread a process; aten's kernel, or with --compile that of
`train.compile`. `one process` is the same kernel over the whole sequence while the other processes
wait. `ring-flash-attention` is that project's zigzag algorithm over the same kernel (ring_peer.py).
An ideal ring takes 1 / cp of the time of one process, if cp busy cores are as fast as one: the row
`apart` says what the machine leaves of that, every process the whole sequence by itself at the same
time. The row without messages says what is left of it to parts of a sequence. Each process has a
core of its own where there are enough; on fewer nothing is faster than their number. Run it on an
idle machine: other work, also of a virtual machine's neighbours, slows several processes more than
one, as the slowest of them is waited for. Beside the median stands the fastest round, which such
work troubles least. The heap is settled as in a run (parallel/heap.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.ring_peer import PeerRing
from model.attention import Alone, Exchange, Layout, Whole
from model.compiled import use_compiled
from model.local import FoldedSequence
from parallel.heap import settle_heap
from parallel.ring import Hop, Ring, choose_exchange
from parallel.slicing import choose_layout

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
ONE, APART = "one process", "apart: each process the whole, at the same time"
FLOOR = "zigzag, no messages sent (wrong results)"
Run = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class Way(NamedTuple):
    """An algorithm: (q, k, v, upstream) [B, 1, S, H, K] -> (out, dq, dk, dv), and its slices."""

    run: Run
    layout: Layout


def folded(layout: Layout, exchange: Exchange) -> Way:
    """Return longhaul's own."""
    sequence = FoldedSequence(layout, exchange)

    def run(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        visible = torch.zeros(q.shape[0], 1, 0, dtype=torch.bool)
        out = sequence.fold(*leaves, pieces=[], visible=visible)
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream))

    return Way(run, layout)


class Unsent(Ring):
    """A ring whose messages cost nothing, as it sends none: own keys stand for every rank's."""

    def pass_on(self, x: Tensor) -> Hop:
        """Return what was to be sent."""
        return Hop(x, x, [])


def ways(size: int) -> dict[str, Way]:
    """Return every algorithm over all ranks, and one process."""
    group = dist.group.WORLD
    assert group is not None
    found = {ONE: folded(Whole(), Alone()), APART: folded(Whole(), Alone())}
    for exchange, name in (("ring", "zigzag"), ("ring", "contiguous"), ("all_gather", "zigzag")):
        layout = choose_layout(name, size)
        found[f"{exchange}, {name}"] = folded(layout, choose_exchange(exchange, group))
    zigzag = choose_layout("zigzag", size)
    found[FLOOR] = folded(zigzag, Unsent(group))
    found["ring-flash-attention"] = Way(PeerRing(), zigzag)
    return found


def join(rank: int, size: int, folder: str) -> None:
    """Become a CPU rank as a run's are: heap settled, one thread, gloo; a core of its own."""
    settle_heap()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= size:
        os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)


def measure(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Run on each process: time every algorithm in alternation; rank 0 prints."""
    join(rank, options.cp, folder)
    use_compiled(options.compile)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(1, 1, options.tokens, heads, HEAD_DIM, generator=generator).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]
    runs = ways(options.cp)
    if options.rows:
        runs = {name: runs[name] for name in (ONE, *options.rows.split(";"))}
    expected = runs[ONE].run(*whole)
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        for name, (run, layout) in runs.items():
            places = layout.positions(rank, options.tokens)
            mine = [x[:, :, places].contiguous() for x in whole]
            dist.barrier()
            begin = time.perf_counter()
            found = run(*mine) if rank == 0 or name != ONE else None
            dist.barrier()
            seconds = time.perf_counter() - begin
            if turn:
                took[name].append(seconds / options.cp if name == APART else seconds)
            elif found is not None and name not in (APART, FLOOR):
                check(name, found, [x[:, :, places] for x in expected])
    if rank == 0:
        show(took, options)
    dist.destroy_process_group()


def check(name: str, found: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    """Raise where a result is another than one process's: bfloat16 rounds at 2^-9."""
    for one, other in zip(found, expected, strict=True):
        error = (one.float() - other.float()).abs().max() / other.float().abs().max()
        assert error < (3e-2 if one.dtype == torch.bfloat16 else 1e-4), (name, error)


def show(took: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print the table."""
    cores = os.cpu_count()
    print(
        f"{options.tokens} tokens, {options.precision}, {options.cp} processes on {cores} cores\n"
    )
    alone, quiet = statistics.median(took[ONE]), min(took[ONE])
    print(f"| | seconds | times one process | of ideal ({options.cp}) | fastest | times its |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, seconds in took.items():
        middle, best = statistics.median(seconds), min(seconds)
        ideal = "" if name == ONE else f"{alone / middle / options.cp:.2f}"
        print(
            f"| {name} | {middle:.3f} | {alone / middle:.2f} | {ideal} | {best:.3f} |"
            f" {quiet / best:.2f} |"
        )


def start(function: Callable[..., None], options: argparse.Namespace) -> None:
    """Run function(rank, options, folder) in options.cp processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(function, (options, folder), nprocs=options.cp)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cp", type=int, choices=(2, 4), default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="as train.compile: true")
    parser.add_argument("--rows", help="of the table, beside one process: NAME;NAME;...")
    start(measure, parser.parse_args())


if __name__ == "__main__":
    main()
