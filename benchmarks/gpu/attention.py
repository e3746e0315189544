"""Attention alone: landmark's kernel beside plain attention, and what a ring hides."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.measure import (
    DEVICE,
    HALF,
    Error,
    Options,
    Row,
    Table,
    attempt,
    difference,
    named,
    times,
)
from benchmarks.gpu.tolerances import RING
from model.kernels import Kernel, choose_kernel
from model.local import FoldedSequence
from model.memory.grouped import choose_grouped
from parallel.ring import Hop, Ring
from parallel.slicing import choose_layout, take_slice

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ASKED = 0.92
"""Of an ideal rank's speed: the rest is hops that are not hidden, merges and smaller calls."""

LINK = 450e9
"""Bytes/s that NVLink 4 moves one way (NVIDIA's data sheet of the H100)."""


def grouped(options: Options) -> Table:
    """Landmark's attention beside plain causal attention, forward and backward."""
    yield ["tokens", "plain, ms", "grouped, ms", "times"]
    for length in (128,) if options.tiny else (4096, 8192, 32768):
        yield attempt([f"{length:,}"], functools.partial(beside_plain, length, options.rounds))


def beside_plain(length: int, rounds: int) -> Row:
    """Return the cells of `grouped`."""
    given = drawn(length, HALF)
    q = given[0]
    took = [
        times(both_ways(kernel, *given), rounds)
        for kernel in (choose_kernel(q), choose_grouped(q, 64))
    ]
    return [*(each.ms for each in took), f"{took[1].median / took[0].median:.2f}"]


def drawn(length: int, dtype: torch.dtype) -> list[Tensor]:
    """Return random q, k, v and the gradient of the output, heads first."""
    shapes = [(1, heads, length, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(each, device=DEVICE, dtype=dtype) for each in shapes]


def both_ways(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> Callable[[], list[Tensor]]:
    """Return forward and backward of one causal call: out, dq, dk, dv."""

    def run() -> list[Tensor]:
        out, lse = kernel.forward(q, k, v, True)
        return [out, *kernel.backward(dout, q, k, v, out, lse, True)]

    return run


class Copied(Ring):
    """A rank of a ring on one device: a hop copies, on a stream of its own, beside computing.

    What arrives is what the previous rank sent at that hop of its last run (its own where there
    was none). As a hop's message depends on the hops before it alone, after as many runs of all
    ranks as a run has hops every message is the right one.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.side = torch.cuda.Stream() if DEVICE.type == "cuda" else None
        self.sent: list[Tensor] = []
        self.arriving: list[Tensor] = []

    def pass_on(self, x: Tensor) -> Hop:
        """Return a hop on the stream of copies."""
        source = self.arriving[len(self.sent)] if self.arriving else x
        self.sent.append(x)
        received = torch.empty_like(source)
        if self.side is None:
            return Hop(x, received.copy_(source), [])
        # As NCCL's stream does, it begins when what is sent is there.
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            received.copy_(source)
            done = self.side.record_event()
        # Its wait, as a Work's, holds back the current stream, not the host.
        return Hop(x, received, [done])


class Share:
    """One rank's part of a ring's forward and backward, by the ring and the fold of a run."""

    def __init__(self, ring: Copied, whole: list[Tensor]) -> None:
        layout = choose_layout("zigzag", ring.size)
        # Heads last, as a layer's: [B, N, S, H, K].
        full = [x.transpose(1, 2).unsqueeze(1) for x in whole]
        q, k, v, self.upstream = (take_slice(x, layout, ring.rank).contiguous() for x in full)
        self.leaves = [x.requires_grad_() for x in (q, k, v)]
        self.ring, self.sequence = ring, FoldedSequence(layout, ring)
        self.places = layout.positions(ring.rank, full[0].shape[2])

    def run(self) -> list[Tensor]:
        """Return out, dq, dk, dv of this rank's tokens."""
        self.ring.sent = []
        out = self.sequence.fold(*self.leaves)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.upstream)]

    def error(self, found: list[Tensor], whole: list[Tensor]) -> float:
        """Return the largest relative difference to these places of one call's results."""
        places = self.places.to(DEVICE)
        pairs = zip(found, whole, strict=True)
        return max(difference(x[:, 0], y[:, :, places].transpose(1, 2)) for x, y in pairs)


def ring(options: Options) -> Table:
    """Each rank's part of a ring of two by zigzag, beside half of one call over the same work.

    Forward and backward of parallel.ring and model.fold, 32 query and 8 key heads of 128; a hop is
    a copy on a stream of its own. Asked: half of the call / the slower rank >= 0.92. A copy inside
    one GPU is faster than NVLink; what the longest hop would take there stands beside it.
    """
    yield ["tokens", "type", "one call, ms", "rank 0, ms", "rank 1, ms",
           f"half / slower rank (asked {ASKED})", "NVLink's longest hop, ms", "error"]  # fmt: skip
    if options.tiny:
        lengths = [(128, torch.float32), (256, HALF)]
    else:
        # In float32 there is no flash kernel: for the error alone.
        lengths = [(2048, torch.float32), *((n, HALF) for n in (16384, 65536, 131072))]
    for length, dtype in lengths:
        make = functools.partial(compare, length, dtype, options.rounds)
        yield attempt([f"{length:,}", named(dtype)], make)


def compare(length: int, dtype: torch.dtype, rounds: int) -> Row:
    """Return the cells of `ring`."""
    torch.manual_seed(0)
    whole = drawn(length, dtype)
    call = both_ways(choose_kernel(whole[0]), *whole)
    shares = [Share(Copied(rank, 2), whole) for rank in range(2)]
    found = [share.run() for share in shares]
    for _ in shares[0].ring.sent:
        messages = [share.ring.sent for share in shares]
        for share in shares:
            share.ring.arriving = messages[share.ring.rank - 1]
        found = [share.run() for share in shares]
    expected = call()
    worst = max(share.error(own, expected) for share, own in zip(shares, found, strict=True))
    hop = max(x.numel() * x.element_size() for x in shares[0].ring.sent) / LINK
    del found, expected
    took = [times(run, rounds) for run in (call, *(share.run for share in shares))]
    ratio = took[0].median / 2 / max(each.median for each in took[1:])
    return [*(each.ms for each in took), f"{ratio:.2f}", f"{1e3 * hop:.2f}",
            Error(worst, RING[dtype])]  # fmt: skip
