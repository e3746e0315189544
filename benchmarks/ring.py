"""Attention over two processes beside one: wall time of forward and backward, one thread a process.

    python benchmarks/ring.py [--tokens 8192] [--precision fp32] [--rounds 5]

8 query heads, 4 key heads of 64. `one process` is the same kernel over the whole sequence while the
other process waits. `ring-flash-attention` is that project's zigzag algorithm (half of the keys
from before, half of the queries for keys from behind, keys and values sent one by one) over the
same kernel. An ideal ring takes half of the time of one process; what two busy cores leave of that
is the row without messages. Run it on an idle machine: other work slows two processes more than
one. The heap is settled as in a run (parallel/heap.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from model.attention import Alone, Exchange, Layout, Visit, VisitBack, Whole, merge
from model.kernels import Kernel, choose_kernel
from model.local import FoldedSequence
from parallel.heap import settle_heap
from parallel.ring import choose_exchange
from parallel.slicing import choose_layout

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
FLOOR = "zigzag, no messages sent (wrong results)"
Run = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def folded(layout: Layout, exchange: Exchange) -> Run:
    """Return longhaul's own: (q, k, v, upstream) [B, 1, S, H, K] -> (out, dq, dk, dv)."""
    sequence = FoldedSequence(layout, exchange)

    def run(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        visible = torch.zeros(q.shape[0], 1, 0, dtype=torch.bool)
        out = sequence.fold(*leaves, pieces=[], visible=visible)
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream))

    return run


class Unsent(Alone):
    """A ring whose messages cost nothing, as it sends none: own keys stand for every rank's."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def visit(self, k: Tensor, v: Tensor, step: Visit) -> None:
        """Call step(source, k, v) for each rank."""
        for t in range(self.size):
            step((self.rank - t) % self.size, k, v)

    def visit_back(self, k: Tensor, v: Tensor, step: VisitBack) -> tuple[Tensor, Tensor]:
        """Return the sum of step(source, k, v) over ranks."""
        dk, dv = (torch.zeros(x.shape) for x in (k, v))
        for t in range(self.size):
            parts = step((self.rank - t) % self.size, k, v)
            dk += parts[0]
            dv += parts[1]
        return dk, dv


class PeerRing:
    """The zigzag ring of ring-flash-attention, for two ranks or more."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        """Return (out, dq, dk, dv)."""
        q, k, v, upstream = (x[:, 0].transpose(1, 2).contiguous() for x in (q, k, v, upstream))
        kernel = choose_kernel(q)
        out, lse = self._forward(kernel, q, k, v)
        dq, dk, dv = self._backward(kernel, q, k, v, upstream, out.to(q.dtype), lse)
        return tuple(x.to(q.dtype).transpose(1, 2).unsqueeze(1) for x in (out, dq, dk, dv))

    def _pass_on(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        received = [torch.empty_like(x) for x in tensors]
        operations = []
        for sent, taken in zip(tensors, received, strict=True):
            operations += [
                dist.P2POp(dist.isend, sent, following),
                dist.P2POp(dist.irecv, taken, before),
            ]
        works = dist.batch_isend_irecv(operations)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return received

        return wait

    def _forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        half, held = q.shape[2] // 2, [k, v]
        result: tuple[Tensor, Tensor] | None = None
        for step in range(self.size):
            wait = self._pass_on(held) if step + 1 < self.size else None
            keys, values = held
            if step == 0:
                out, lse = kernel.forward(q, keys, values, True)
                result = out.float(), lse
            elif step <= self.rank:
                out, lse = kernel.forward(q, _first(keys, half), _first(values, half), False)
                assert result is not None
                result = merge(result, (out.float(), lse))
            else:
                out, lse = kernel.forward(_last(q, half), keys, values, False)
                assert result is not None
                late = merge((result[0][:, :, half:], result[1][:, :, half:]), (out.float(), lse))
                result[0][:, :, half:], result[1][:, :, half:] = late
            if wait is not None:
                held = wait()
        assert result is not None
        return result

    def _backward(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        upstream: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        half, held = q.shape[2] // 2, [k, v]
        dq = torch.zeros(q.shape)
        grads: list[Tensor] = [torch.zeros(k.shape), torch.zeros(v.shape)]
        arriving: Callable[[], list[Tensor]] | None = None
        for step in range(self.size):
            wait = self._pass_on(held) if step + 1 < self.size else None
            keys, values = held
            part_k, part_q = slice(None), slice(None)
            if step and step <= self.rank:
                part_k = slice(0, half)
            elif step:
                part_q = slice(half, None)
            asked, given, mine, weights = (
                x[:, :, part_q].contiguous() for x in (upstream, q, out, lse)
            )
            dq_part, dk, dv = kernel.backward(
                asked,
                given,
                keys[:, :, part_k].contiguous(),
                values[:, :, part_k].contiguous(),
                mine,
                weights,
                step == 0,
            )
            dq[:, :, part_q] += dq_part
            if arriving is not None:
                grads = arriving()
            grads[0][:, :, part_k] += dk
            grads[1][:, :, part_k] += dv
            arriving = self._pass_on(grads)
            if wait is not None:
                held = wait()
        assert arriving is not None
        dk, dv = arriving()
        return dq, dk, dv


def _first(x: Tensor, half: int) -> Tensor:
    return x[:, :, :half].contiguous()


def _last(x: Tensor, half: int) -> Tensor:
    return x[:, :, half:].contiguous()


def measure(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Run on each process: time every algorithm in alternation; rank 0 prints."""
    settle_heap()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    assert dist.group.WORLD is not None
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(1, 1, options.tokens, heads, HEAD_DIM, generator=generator).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]
    runs: dict[str, tuple[Run, Layout | None]] = {"one process": (folded(Whole(), Alone()), None)}
    for exchange, name in (("ring", "zigzag"), ("ring", "contiguous"), ("all_gather", "zigzag")):
        cut = choose_layout(name, 2)
        run = folded(cut, choose_exchange(exchange, dist.group.WORLD))
        runs[f"{exchange}, {name}"] = (run, cut)
    runs[FLOOR] = (folded(choose_layout("zigzag", 2), Unsent(rank, 2)), choose_layout("zigzag", 2))
    runs["ring-flash-attention"] = (PeerRing(), choose_layout("zigzag", 2))
    expected = runs["one process"][0](*whole)
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        for name, (run, layout) in runs.items():
            places = None if layout is None else layout.positions(rank, options.tokens)
            mine = whole if places is None else [x[:, :, places].contiguous() for x in whole]
            dist.barrier()
            begin = time.perf_counter()
            found = run(*mine) if rank == 0 or places is not None else expected
            dist.barrier()
            if turn:
                took[name].append(time.perf_counter() - begin)
            elif places is not None and name != FLOOR:
                for one, all_of_it in zip(found, expected, strict=True):
                    other = all_of_it[:, :, places].float()
                    error = (one.float() - other).abs().max() / other.abs().max()
                    assert error < (3e-2 if options.precision == "bf16" else 1e-4), (name, error)
    if rank == 0:
        show(took)
    dist.destroy_process_group()


def show(took: dict[str, list[float]]) -> None:
    """Print the table."""
    alone = statistics.median(took["one process"])
    print("| | seconds | times one process |")
    print("| --- | --- | --- |")
    for name, seconds in took.items():
        middle = statistics.median(seconds)
        print(f"| {name} | {middle:.3f} | {alone / middle:.2f} |")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (options, str(Path(folder))), nprocs=2)


if __name__ == "__main__":
    main()
