"""Attention as a fold of `merge`, written once for one device and for a ring.

The backward of a softmax piece needs only the fold's final (out, lse), so pieces are revisited one
by one and nothing of size Sq x Sk, and no rotated key, is ever saved (Liu et al. 2023, Ring
Attention).

Shapes: q [B, N, S, H, K]; k, v [B, M + N, S, Hkv, K], the first M segments carried from before, and
heads first, [B, M + N, Hkv, S, K], where they visit ranks; keys of a Piece [B, N, F, Hkv, K]: what
tokens of segment n read beside their segment.

Gradients follow one rule: what every rank holds whole gets, on each rank, a part whose sum over the
ranks is the gradient; so the sum over ranks that ZeRO takes of every weight is right for memory and
tokens alike.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention import Exchange, Layout, Partial, Span, Sum, merge
from model.kernels import Kernel, choose_kernel
from model.packed import Block, Packed, backward_blocks, forward_blocks

ALL = slice(None)
_LONG = 2048
"""Rows from which on it pays; see benchmarks/ring.py."""


class Piece(NamedTuple):
    """Keys beside those of tokens, the same on every rank.

    k, v [B, N, F, Hkv, K] for tokens, [B, F, Hkv, K] for rows; visible, of the same leading
    dimensions or, for tokens, [B, N, S]: False where stream or token must not read them (None:
    all read them).
    """

    k: Tensor
    v: Tensor
    visible: Tensor | None = None
    queries: slice = ALL  # the query rows of this rank that read it
    causal: bool = False  # query i reads keys 0 .. i only; for as many queries as keys


_Marks = tuple[tuple[Tensor | None, slice, bool], ...]
"""Of each Piece: visible, queries, causal."""


class _How(NamedTuple):
    """What a fold knows beside its tensors."""

    visible: Tensor | None
    pieces: _Marks
    layout: Layout
    exchange: Exchange
    kernel: Kernel | None  # of token keys; None: plain attention
    packed: Packed | None = None  # of packed segments


class _Reads:
    """The reads of token keys in one fold: which kernel call reads what, forward and backward."""

    def __init__(self, q: Tensor, k: Tensor, how: _How) -> None:
        self.count, self.carried = q.shape[1], k.shape[1] - q.shape[1]
        self.length, self.layout, self.rank = q.shape[2], how.layout, how.exchange.rank
        self.visible, self.packed = how.visible, how.packed
        self.plain: Kernel = choose_kernel(q)
        self.kernel = how.kernel or self.plain

    def segments(self, lag: int) -> slice:
        """Return where, among the M + N segments of keys, those `lag` before each query's are."""
        return slice(self.carried - lag, self.carried - lag + self.count)

    def pieces(self, source: int) -> list[tuple[int, Span, list[Block] | None]]:
        """Return (lag, span, blocks) for all that this rank's queries read of rank source's keys.

        blocks: the reads inside documents that the span is made of, where segments are packed.
        """
        own: list[tuple[int, Span, list[Block] | None]] = []
        for number, span in enumerate(self.layout.spans(self.rank, source, self.length)):
            blocks = None
            if self.packed is not None:
                blocks = self.packed.blocks(self.layout, self.rank, source, number)
            own.append((0, span, blocks))
        return own + [(lag, Span(ALL, ALL, False), None) for lag in range(1, self.carried + 1)]

    def hide(self, lse: Tensor, lag: int, value: float) -> Tensor:
        """Return lse [B*N, H, S], `value` where the segment `lag` before is another document's."""
        if lag == 0:
            return lse
        if self.visible is not None:
            lse = _hide(lse, self.visible[:, :, lag - 1], value)
        return lse if self.packed is None else _hide(lse, self.packed.first, value)


def _hide(lse: Tensor, visible: Tensor | None, value: float, rows: slice = ALL) -> Tensor:
    """Return lse [B*N, H, rows] with `value` where visible [B, N] ([B], [B, N, S]) is False."""
    if visible is None:
        return lse
    if visible.dim() < 3:
        return lse.masked_fill(~visible.reshape(-1, 1, 1), value)
    return lse.masked_fill(~visible.flatten(0, 1)[:, None, rows], value)


def _heads_first(x: Tensor) -> Tensor:
    """[B, N, S, H, K] -> [B * N, H, S, K]."""
    return x.flatten(0, 1).transpose(1, 2)


def _laid_out(x: Tensor) -> Tensor:
    """Return [..., H, S, K] in memory of its own, and as its kernel reads it fastest.

    What is a view of a projection (values are) would keep all of it until the backward. On a CPU a
    head's long rows lie together: what that gains grows with the square of S, the copy with S.
    """
    if x.device.type == "cpu" and x.shape[-2] >= _LONG:
        return x.contiguous()
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def _heads_last(x: Tensor, batch: int) -> Tensor:
    """[B * N, H, S, K] -> [B, N, S, H, K]."""
    result: Tensor = x.transpose(1, 2).unflatten(0, (batch, -1))
    return result


def _asking(heads: slice, num_kv_heads: int, num_heads: int) -> slice:
    """Return the query heads that read some key heads."""
    first, end, _ = heads.indices(num_kv_heads)
    each = num_heads // num_kv_heads
    return slice(first * each, end * each)


def _has_rows(rows: slice, length: int) -> bool:
    return len(range(*rows.indices(length))) > 0


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        other_out: Tensor | None,
        other_lse: Tensor | None,
        how: _How,
        *keys: Tensor,
    ) -> Tensor:
        reads = _Reads(q, k, how)
        queries = _laid_out(_heads_first(q))
        partial = Partial(queries)

        def step(source: int, k: Tensor, v: Tensor) -> None:
            for lag, span, blocks in reads.pieces(source):
                segments = reads.segments(lag)
                read = (
                    queries[:, :, span.queries],
                    k[:, segments, :, span.keys].flatten(0, 1),
                    v[:, segments, :, span.keys].flatten(0, 1),
                    span.causal,
                )
                if blocks is None:
                    out, lse = reads.kernel.forward(*read)
                else:
                    out, lse = forward_blocks(reads.kernel, *read, blocks)
                partial.add(span.queries, out, reads.hide(lse, lag, float("-inf")))

        k_heads, v_heads = (_laid_out(x.transpose(2, 3)) for x in (k, v))
        how.exchange.visit(k_heads, v_heads, step)
        for i, (visible, rows, _) in enumerate(how.pieces):
            if _has_rows(rows, queries.shape[2]):
                out, lse = reads.plain.forward(
                    queries[:, :, rows],
                    _heads_first(keys[2 * i]),
                    _heads_first(keys[2 * i + 1]),
                    False,
                )
                partial.add(rows, out, _hide(lse, visible, float("-inf"), rows))
        if other_out is not None and other_lse is not None:
            partial.add(ALL, _heads_first(other_out), other_lse.flatten(0, 1))
        assert partial.out is not None
        out = partial.out.to(q.dtype)
        held = (queries, k_heads, v_heads)  # as laid out: what they were made of is not kept
        ctx.save_for_backward(*held, other_out, other_lse, out, partial.lse, *keys)
        ctx.reads, ctx.how, ctx.batch = reads, how, q.shape[0]
        return _heads_last(out, q.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        queries, k_heads, v_heads, other_out, other_lse, out, lse, *keys = ctx.saved_tensors
        reads: _Reads = ctx.reads
        batch: int = ctx.batch
        dout = _laid_out(_heads_first(dout))
        dq = Sum(queries)

        def step(source: int, k: Tensor, v: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
            asking = _asking(heads, k.shape[2], queries.shape[1])
            k, v = k[:, :, heads], v[:, :, heads]
            dk, dv = Sum(k), Sum(v)
            for lag, span, blocks in reads.pieces(source):
                rows = (ALL, asking, span.queries)
                where = (ALL, reads.segments(lag), ALL, span.keys)
                read = (
                    dout[rows],
                    queries[rows],
                    k[where].flatten(0, 1),
                    v[where].flatten(0, 1),
                    out[rows],
                    reads.hide(lse, lag, float("inf"))[rows],
                    span.causal,
                )
                if blocks is None:
                    grads = reads.kernel.backward(*read)
                else:
                    grads = backward_blocks(reads.kernel, *read, blocks)
                dq.add(rows, grads[0])
                dk.add(where, grads[1].unflatten(0, (k.shape[0], -1)))
                dv.add(where, grads[2].unflatten(0, (k.shape[0], -1)))
            return dk.result(), dv.result()

        dk, dv = ctx.how.exchange.visit_back(k_heads, v_heads, step)
        dk, dv = dk.transpose(2, 3), dv.transpose(2, 3)
        dkeys: list[Tensor] = []
        for i, (visible, rows, _) in enumerate(ctx.how.pieces):
            piece_k, piece_v = keys[2 * i], keys[2 * i + 1]
            if not _has_rows(rows, queries.shape[2]):
                dkeys += [torch.zeros_like(piece_k), torch.zeros_like(piece_v)]
                continue
            grads = reads.plain.backward(
                dout[:, :, rows],
                queries[:, :, rows],
                _heads_first(piece_k),
                _heads_first(piece_v),
                out[:, :, rows],
                _hide(lse, visible, float("inf"))[:, :, rows],
                False,
            )
            dq.add((ALL, ALL, rows), grads[0])
            dkeys += [_heads_last(g, batch).to(queries.dtype) for g in grads[1:]]
        dq_home = _heads_last(dq.result().to(queries.dtype), batch)
        others = _of_other(dout, out, lse, other_out, other_lse)
        return dq_home, dk.to(k_heads.dtype), dv.to(v_heads.dtype), *others, None, *dkeys


def _of_other(
    dout: Tensor, out: Tensor, lse: Tensor, other_out: Tensor | None, other_lse: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a result that was merged in: its share of dout, and of the rest."""
    if other_out is None or other_lse is None:
        return None, None
    share = torch.exp(other_lse.flatten(0, 1) - lse)
    wide = dout.to(share.dtype)
    dlse = share * (wide * (_heads_first(other_out).to(share.dtype) - out)).sum(-1)
    back = _heads_last(wide * share.unsqueeze(-1), other_out.shape[0])
    return back.to(other_out.dtype), dlse.unflatten(0, other_lse.shape[:2])


def fold(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pieces: Items[Piece] = (),
    visible: Tensor | None = None,
    layout: Layout,
    exchange: Exchange,
    kernel: Kernel | None = None,
    other: tuple[Tensor, Tensor] | None = None,
    packed: Packed | None = None,
) -> Tensor:
    """Return causal attention of each segment's tokens over their segment, the past and pieces.

    q [B, N, S, H, K]; k, v [B, M + N, S, Hkv, K]; visible [B, N, M] bool: may segment n read
    segment n - 1 - m (None: all may). S is this rank's slice. kernel: of token keys, where it is
    not plain softmax. other: a result over other keys, out [B, N, S, H, K] and lse [B, N, H, S],
    that is merged in. packed: several documents a segment; a token then reads its own document's
    keys, and segments before only if it is in the first. The result has q's shape and type.
    """
    how = _How(visible, _marks(pieces), layout, exchange, kernel, packed)
    keys = _keys(pieces, q.dtype)
    result: Tensor = _Fold.apply(q, k, v, *(other or (None, None)), how, *keys)  # type: ignore[no-untyped-call]
    return result


def _marks(pieces: Items[Piece]) -> _Marks:
    return tuple((piece.visible, piece.queries, piece.causal) for piece in pieces)


def _keys(pieces: Items[Piece], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for piece in pieces for x in (piece.k, piece.v)]


class _FoldSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        marks: _Marks,
        exchange: Exchange,
        *keys: Tensor,
    ) -> Tensor:
        kernel = choose_kernel(q)
        queries, *pairs = (x.transpose(1, 2) for x in (q, k, v, *keys))
        out, lse = exchange.combine(*kernel.forward(queries, pairs[0], pairs[1], False))
        out = out.to(lse.dtype)
        for i, (visible, _, causal) in enumerate(marks, 1):
            own, own_lse = kernel.forward(queries, pairs[2 * i], pairs[2 * i + 1], causal)
            out, lse = merge((out, lse), (own, _hide(own_lse, visible, float("-inf"))))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, *keys)
        ctx.marks, ctx.exchange = marks, exchange
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *keys = ctx.saved_tensors
        kernel, exchange = choose_kernel(q), ctx.exchange
        queries, *pairs = (x.transpose(1, 2) for x in (q, k, v, *keys))
        dout = exchange.sum(dout.contiguous()).transpose(1, 2)
        dq, dk, dv = kernel.backward(dout, queries, pairs[0], pairs[1], out, lse, False)
        # Every rank holds the pieces' keys: each keeps an equal part of their gradient.
        part, dkeys = 1.0 / exchange.size, []
        for i, (visible, _, causal) in enumerate(ctx.marks, 1):
            own = kernel.backward(
                dout,
                queries,
                pairs[2 * i],
                pairs[2 * i + 1],
                out,
                _hide(lse, visible, float("inf")),
                causal,
            )
            dq = dq + own[0] * part
            dkeys += [g * part for g in own[1:]]
        return (
            *(g.transpose(1, 2) for g in (dq, dk, dv)),
            None,
            None,
            *(g.transpose(1, 2) for g in dkeys),
        )


def fold_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pieces: Items[Piece],
    exchange: Exchange,
) -> Tensor:
    """Return attention of replicated queries over a whole segment and the pieces.

    q [B, F, H, K], the same on every rank; k, v [B, S, Hkv, K], this rank's slice of the segment.
    The result [B, F, H, K] is the same on every rank.
    """
    keys = _keys(pieces, q.dtype)
    result: Tensor = _FoldSlots.apply(q, k, v, _marks(pieces), exchange, *keys)  # type: ignore[no-untyped-call]
    return result
