"""What attention results are joined by: `merge`, how a segment is cut, how its keys travel.

A result is a pair (out, lse). Every set of keys (this rank's slice, another rank's, an earlier
segment, memory slots) is a piece; `merge` joins pieces over disjoint key sets. model.fold makes
attention of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.precision import sum_dtype


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (out, lse) over the union of two disjoint key sets.

    out [..., K] and lse [...] in float32 or wider. Associative; an lse of -inf is the empty set and
    changes nothing, on either side or both. Differentiable, also where sets are empty.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    joined, share = _join(lse_a, lse_b)
    out = torch.lerp(out_a, out_b.to(out_a.dtype), share.to(out_a.dtype).unsqueeze(-1))
    return out, joined


def _join(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lse of both sets, and b's share of the union, 0 where both are empty."""
    # -inf - -inf is nan, and so is its gradient: two empty sets are joined as 0s, then hidden.
    nothing = torch.maximum(lse_a, lse_b) == float("-inf")
    joined = torch.logaddexp(lse_a.masked_fill(nothing, 0.0), lse_b.masked_fill(nothing, 0.0))
    return joined.masked_fill(nothing, float("-inf")), torch.exp(lse_b - joined)


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
        """Return the places in the segment of rank's tokens, rising: [slice length] int64."""
        ...

    def first_half(self) -> Layout | None:
        """Return how the first halves of all slices lie in the segment's first half, if they do."""
        ...


class Whole:
    """The layout of one device: it holds the segment, in order."""

    def spans(self, query_rank: int, key_rank: int, length: int) -> list[Span]:
        """Return the one causal read."""
        return [Span(slice(None), slice(None), True)]

    def positions(self, rank: int, segment_len: int) -> Tensor:
        """Return every place, in order."""
        return torch.arange(segment_len)

    def first_half(self) -> Layout:
        """Return the layout of one device."""
        return self


Visit = Callable[[int, Tensor, Tensor], None]
VisitBack = Callable[[int, Tensor, Tensor, slice], tuple[Tensor, Tensor]]


class Exchange(Protocol):
    """Brings every rank's keys past this rank's queries, and their gradients home."""

    rank: int
    size: int

    def visit(self, k: Tensor, v: Tensor, step: Visit) -> None:
        """Call step(source, k, v) for each rank's keys, this rank's own first."""
        ...

    def visit_back(self, k: Tensor, v: Tensor, step: VisitBack) -> tuple[Tensor, Tensor]:
        """Call step(source, k, v, heads) -> (dk, dv) for all heads of each rank's keys.

        k, v [..., Hkv, S, K] have every head; heads: those whose dk, dv this call returns. Heads of
        a rank may come at several times. Returns this rank's dk, dv, summed.
        """
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
        return step(0, k, v, slice(None))

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
        # Nobody else has the kernel's results: they are merged where they lie.
        self.out = self.out.to(self.lse.dtype)
        here, here_lse = self.out[:, :, rows], self.lse[:, :, rows]
        joined, share = _join(here_lse, lse)
        here.lerp_(out.to(here.dtype), share.to(here.dtype).unsqueeze(-1))
        here_lse.copy_(joined)


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
            self.total = torch.zeros_like(self.like, dtype=sum_dtype(x))
            self.total[index] = x
            return
        if self.fresh:  # the first piece's own tensor: widen it before others are added
            self.total, self.fresh = self.total.to(sum_dtype(x), copy=True), False
        self.total[index] += x

    def result(self) -> Tensor:
        """Return the sum, in float32 where more than one piece was added."""
        return torch.zeros_like(self.like) if self.total is None else self.total
