"""How a segment's tokens are cut over context-parallel ranks.

zigzag: the segment in 2P chunks, rank r holds chunks r and 2P-1-r: every ring step is half a block
pair of work on every rank (Llama 3, section 3.3.2). contiguous: rank r holds the r-th P-th; simple,
but later ranks have up to twice the mean work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import Layout, Span, Whole

ALL = slice(None)


class Zigzag:
    """Chunks r and 2P-1-r on rank r."""

    def __init__(self, size: int) -> None:
        self.size = size

    def positions(self, rank: int, segment_len: int) -> Tensor:
        """Return the places of rank's tokens: its early chunk, then its late one."""
        check_segment_len(segment_len, self.size, "zigzag")
        chunk = segment_len // (2 * self.size)
        early, late = rank * chunk, (2 * self.size - 1 - rank) * chunk
        return torch.cat((torch.arange(early, early + chunk), torch.arange(late, late + chunk)))

    def first_half(self) -> Layout:
        """Return where the early chunks lie in the first half: one after the other."""
        return Contiguous(self.size)

    def spans(self, query_rank: int, key_rank: int, length: int) -> list[Span]:
        """Return the reads: half a block pair from every rank, so balanced.

        Causal at home; a lower rank's early chunk lies before all queries; a higher rank's two
        chunks lie between the queries' two.
        """
        half = length // 2
        if query_rank == key_rank:
            return [Span(ALL, ALL, True)]
        if key_rank < query_rank:
            return [Span(ALL, slice(0, half), False)]
        return [Span(slice(half, length), ALL, False)]


class Contiguous:
    """The r-th of P equal parts on rank r."""

    def __init__(self, size: int) -> None:
        self.size = size

    def positions(self, rank: int, segment_len: int) -> Tensor:
        """Return the places of rank's tokens."""
        check_segment_len(segment_len, self.size, "contiguous")
        length = segment_len // self.size
        return torch.arange(rank * length, (rank + 1) * length)

    def first_half(self) -> Layout | None:
        """Return None: the first half lies on the lower half of the ranks alone."""
        return self if self.size == 1 else None

    def spans(self, query_rank: int, key_rank: int, length: int) -> list[Span]:
        """Return the reads: causal at home, all of a lower rank, nothing of a higher one."""
        if key_rank > query_rank:
            return []
        return [Span(ALL, ALL, query_rank == key_rank)]


def choose_layout(name: str, size: int) -> Layout:
    """Return the layout `zigzag` or `contiguous` over size ranks."""
    layouts: dict[str, type[Zigzag] | type[Contiguous]] = {
        "zigzag": Zigzag,
        "contiguous": Contiguous,
    }
    return layouts[name](size)


def check_segment_len(segment_len: int, cp: int, layout: str) -> None:
    """Raise ValueError where a segment cannot be cut into equal slices."""
    unit = 2 * cp if layout == "zigzag" else cp
    if segment_len % unit:
        why = f"2 * cp={unit} (zigzag gives each rank two chunks)" if unit != cp else f"cp={cp}"
        near = max(unit, segment_len // unit * unit)
        raise ValueError(f"segment_len={segment_len} is not a multiple of {why}; use {near}")


def take_slice(x: Tensor, layout: Layout, rank: int, dim: int = 2) -> Tensor:
    """Return rank's tokens of whole segments, which lie along dim: of S, S / size."""
    return x.index_select(dim, layout.positions(rank, x.shape[dim]).to(x.device))


def layout_of(name: str, size: int) -> Layout:
    """Return the layout over size ranks; of one rank, whole segments."""
    return choose_layout(name, size) if size > 1 else Whole()


def join_tokens(slices: Sequence[Tensor], layout: Layout, dim: int) -> Tensor:
    """Return whole segments from every rank's slice, in order of rank: take_slice's inverse."""
    length = sum(part.shape[dim] for part in slices)
    places = torch.cat([layout.positions(rank, length) for rank in range(len(slices))])
    joined = torch.cat(list(slices), dim)
    return joined.index_select(dim, places.argsort().to(joined.device))
