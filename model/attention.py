"""Attention as a fold of `merge`, written once for one device and for a ring.

A result is a pair (out, lse). Every set of keys (this rank's slice, another rank's, an earlier
segment, memory slots) is a piece; `merge` joins pieces over disjoint key sets. The backward of a
softmax piece needs only the fold's final (out, lse), so pieces are revisited one by one and nothing
of size Sq x Sk, and no rotated key, is ever saved (Liu et al. 2023, Ring Attention).

Shapes: q [B, N, S, H, K]; k, v [B, M + N, S, Hkv, K], the first M segments carried from before;
slot keys [B, N, F, Hkv, K]: what tokens of segment n read beside their segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels import Kernel, choose_kernel


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (out, lse) over the union of two disjoint key sets.

    out [..., K] and lse [...] in float32 or wider. Associative; an lse of -inf is the empty set and
    changes nothing, on either side or both.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    # Both sets empty: -inf - -inf is nan, and the share of nothing is 0.
    share = torch.where(lse_b == float("-inf"), 0.0, torch.exp(lse_b - lse)).to(out_a.dtype)
    return torch.lerp(out_a, out_b.to(out_a.dtype), share.unsqueeze(-1)), lse


class Span(NamedTuple):
    """Which of a rank's query rows read which of another rank's keys, inside one segment."""

    queries: slice
    keys: slice
    causal: bool


class Layout(Protocol):
    """How a segment is cut over ranks."""

    def spans(self, query_rank: int, key_rank: int, length: int) -> list[Span]:
        """Return the causal reads of query_rank's slice (length tokens) in key_rank's slice.

        The first span of a rank's own slice must cover all its queries.
        """
        ...

    def positions(self, rank: int, segment_len: int) -> Tensor:
        """Return the places in the segment of rank's tokens: [slice length] int64."""
        ...


class Whole:
    """The layout of one device: it holds the segment, in order."""

    def spans(self, query_rank: int, key_rank: int, length: int) -> list[Span]:
        """Return the one causal read."""
        return [Span(slice(None), slice(None), True)]

    def positions(self, rank: int, segment_len: int) -> Tensor:
        """Return every place, in order."""
        return torch.arange(segment_len)


Visit = Callable[[int, Tensor, Tensor], None]
VisitBack = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class Exchange(Protocol):
    """Brings every rank's keys past this rank's queries, and their gradients home."""

    rank: int
    size: int

    def visit(self, k: Tensor, v: Tensor, step: Visit) -> None:
        """Call step(source, k, v) for each rank's keys, this rank's own first."""
        ...

    def visit_back(self, k: Tensor, v: Tensor, step: VisitBack) -> tuple[Tensor, Tensor]:
        """Call step(source, k, v) -> (dk, dv) likewise; return this rank's dk, dv, summed."""
        ...

    def combine(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merge partial results of the same queries over each rank's keys; equal on all ranks."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks."""
        ...


class Alone:
    """The exchange of one device."""

    rank = 0
    size = 1

    def visit(self, k: Tensor, v: Tensor, step: Visit) -> None:
        """Visit the own keys."""
        step(0, k, v)

    def visit_back(self, k: Tensor, v: Tensor, step: VisitBack) -> tuple[Tensor, Tensor]:
        """Visit the own keys."""
        return step(0, k, v)

    def combine(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Return the only part."""
        return out, lse

    def sum(self, x: Tensor) -> Tensor:
        """Return the only summand."""
        return x


class Partial:
    """A fold in progress: (out, lse), in the kernel's type while one piece is all, then float32."""

    def __init__(self, q: Tensor) -> None:
        self.shape = q.shape
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge a piece into the given query rows; out [B, H, rows, K]."""
        if self.out is None or self.lse is None:
            assert out.shape == self.shape, "the first piece must cover every row"
            self.out, self.lse = out, lse
            return
        self.out = self.out.to(self.lse.dtype)
        here = (self.out[:, :, rows], self.lse[:, :, rows])
        new_out, new_lse = merge(here, (out, lse))
        self.out[:, :, rows], self.lse[:, :, rows] = new_out, new_lse


class Sum:
    """A gradient in progress: kept as it comes while one piece is all, then in float32."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.fresh = like, False
        self.total: Tensor | None = None

    def add(self, index: tuple[slice, ...], x: Tensor) -> None:
        """Add x at index of the whole."""
        if self.total is None:
            if x.shape == self.like.shape:
                self.total, self.fresh = x, True
                return
            self.total = torch.zeros_like(self.like, dtype=_wide(x))
        if self.fresh:  # the first piece's own tensor: widen it before others are added
            self.total, self.fresh = self.total.to(_wide(x), copy=True), False
        self.total[index] += x

    def result(self) -> Tensor:
        """Return the sum, in float32 where more than one piece was added."""
        return torch.zeros_like(self.like) if self.total is None else self.total


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


ALL = slice(None)


class _Reads:
    """The pieces of one fold: which kernel call reads what. Shared by forward and backward."""

    def __init__(self, q: Tensor, k: Tensor, visible: Tensor | None, layout: Layout, rank: int):
        self.count, self.carried = q.shape[1], k.shape[1] - q.shape[1]
        self.length, self.layout, self.rank = q.shape[2], layout, rank
        self.visible = visible
        self.kernel: Kernel = choose_kernel(q)

    def segments(self, lag: int) -> slice:
        """Return where, among the M + N segments of keys, those `lag` before each query's are."""
        return slice(self.carried - lag, self.carried - lag + self.count)

    def pieces(self, source: int) -> list[tuple[int, Span]]:
        """Return (lag, span) for all that this rank's queries read of rank source's keys."""
        own = [(0, span) for span in self.layout.spans(self.rank, source, self.length)]
        return own + [(lag, Span(ALL, ALL, False)) for lag in range(1, self.carried + 1)]

    def hide(self, lse: Tensor, lag: int, value: float) -> Tensor:
        """Return lse [B*N, H, S], `value` where the segment `lag` before is another document's."""
        if lag == 0 or self.visible is None:
            return lse
        hidden = ~self.visible[:, :, lag - 1].reshape(-1, 1, 1)
        return lse.masked_fill(hidden, value)


def _heads_first(x: Tensor) -> Tensor:
    """[B, N, S, H, K] -> [B * N, H, S, K]."""
    return x.flatten(0, 1).transpose(1, 2)


def _heads_last(x: Tensor, batch: int) -> Tensor:
    """[B * N, H, S, K] -> [B, N, S, H, K]."""
    result: Tensor = x.transpose(1, 2).unflatten(0, (batch, -1))
    return result


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slot_k: Tensor | None,
        slot_v: Tensor | None,
        visible: Tensor | None,
        layout: Layout,
        exchange: Exchange,
    ) -> Tensor:
        reads = _Reads(q, k, visible, layout, exchange.rank)
        queries = _heads_first(q)
        partial = Partial(queries)

        def step(source: int, k: Tensor, v: Tensor) -> None:
            for lag, span in reads.pieces(source):
                segments = reads.segments(lag)
                out, lse = reads.kernel.forward(
                    queries[:, :, span.queries],
                    _heads_first(k[:, segments, span.keys]),
                    _heads_first(v[:, segments, span.keys]),
                    span.causal,
                )
                partial.add(span.queries, out, reads.hide(lse, lag, float("-inf")))

        exchange.visit(k, v, step)
        if slot_k is not None and slot_v is not None:
            partial.add(
                ALL,
                *reads.kernel.forward(queries, _heads_first(slot_k), _heads_first(slot_v), False),
            )
        assert partial.out is not None
        out = partial.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, slot_k, slot_v, out, partial.lse)
        ctx.reads, ctx.exchange = reads, exchange
        return _heads_last(out, q.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slot_k, slot_v, out, lse = ctx.saved_tensors
        reads: _Reads = ctx.reads
        queries, dout = _heads_first(q), _heads_first(dout)
        dq = Sum(queries)

        def step(source: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            dk, dv = Sum(k), Sum(v)
            for lag, span in reads.pieces(source):
                rows, where = span.queries, (ALL, reads.segments(lag), span.keys)
                grads = reads.kernel.backward(
                    dout[:, :, rows],
                    queries[:, :, rows],
                    _heads_first(k[where]),
                    _heads_first(v[where]),
                    out[:, :, rows],
                    reads.hide(lse, lag, float("inf"))[:, :, rows],
                    span.causal,
                )
                dq.add((ALL, ALL, rows), grads[0])
                dk.add(where, _heads_last(grads[1], k.shape[0]))
                dv.add(where, _heads_last(grads[2], k.shape[0]))
            return dk.result(), dv.result()

        dk, dv = ctx.exchange.visit_back(k, v, step)
        slot_dk = slot_dv = None
        if slot_k is not None:
            slots = (_heads_first(slot_k), _heads_first(slot_v))
            grads = reads.kernel.backward(dout, queries, *slots, out, lse, False)
            dq.add((ALL, ALL, ALL), grads[0])
            slot_dk, slot_dv = (_heads_last(g, q.shape[0]) for g in grads[1:])
        dq_home = _heads_last(dq.result().to(q.dtype), q.shape[0])
        return dq_home, dk.to(k.dtype), dv.to(v.dtype), slot_dk, slot_dv, None, None, None


def fold(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slots: tuple[Tensor, Tensor] | None,
    visible: Tensor | None,
    layout: Layout,
    exchange: Exchange,
) -> Tensor:
    """Return causal attention of each segment's tokens over their segment, the past and slots.

    q [B, N, S, H, K]; k, v [B, M + N, S, Hkv, K]; slots two of [B, N, F, Hkv, K] or None;
    visible [B, N, M] bool: may segment n read segment n - 1 - m (None: all may). S is this rank's
    slice. The result has q's shape and type. Gradients of slots are this rank's part of their sum
    over the exchange's ranks.
    """
    slot_k, slot_v = slots if slots is not None else (None, None)
    result: Tensor = _Fold.apply(q, k, v, slot_k, slot_v, visible, layout, exchange)  # type: ignore[no-untyped-call]
    return result


class _FoldSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slot_k: Tensor,
        slot_v: Tensor,
        exchange: Exchange,
    ) -> Tensor:
        kernel = choose_kernel(q)
        queries, *keys = (x.transpose(1, 2) for x in (q, k, v, slot_k, slot_v))
        out, lse = exchange.combine(*kernel.forward(queries, keys[0], keys[1], False))
        own = kernel.forward(queries, keys[2], keys[3], False)
        out, lse = merge((out.to(lse.dtype), lse), own)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, slot_k, slot_v, out, lse)
        ctx.exchange = exchange
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slot_k, slot_v, out, lse = ctx.saved_tensors
        kernel = choose_kernel(q)
        queries, *keys = (x.transpose(1, 2) for x in (q, k, v, slot_k, slot_v))
        dout = ctx.exchange.sum(dout.contiguous()).transpose(1, 2)
        dq, dk, dv = kernel.backward(dout, queries, keys[0], keys[1], out, lse, False)
        # Every rank holds the slots' own keys: each keeps an equal part of their gradient.
        part = 1.0 / ctx.exchange.size
        own = kernel.backward(dout, queries, keys[2], keys[3], out, lse, False)
        grads = (dq + own[0] * part, dk, dv, own[1] * part, own[2] * part)
        return *(g.transpose(1, 2) for g in grads), None


def fold_slots(
    q: Tensor, k: Tensor, v: Tensor, *, slots: tuple[Tensor, Tensor], exchange: Exchange
) -> Tensor:
    """Return attention of replicated slot queries over a whole segment and the slots themselves.

    q [B, F, H, K], the same on every rank; k, v [B, S, Hkv, K], this rank's slice of the segment;
    slots two of [B, F, Hkv, K]. The result [B, F, H, K] is the same on every rank.
    Gradients follow one rule: what is replicated gets, on each rank, a part whose sum over the
    ranks is the gradient; so the sum over ranks that ZeRO takes of every weight is right for slots
    and tokens alike.
    """
    result: Tensor = _FoldSlots.apply(q, k, v, *slots, exchange)  # type: ignore[no-untyped-call]
    return result
