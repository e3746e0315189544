"""An associative scan over segments that starts afresh where a document does.

What a memory carries is often a product under an associative operator: sums, affine maps, merges
of softmax. Then all segments of a forward pass are joined in log2(N) steps over whole tensors
(Hillis & Steele 1986) in the place of N steps one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Item = tuple[Tensor, ...]
"""One element for each segment: tensors of [B, N, ...]."""


def scan(
    join: Callable[[Item, Item], Item], items: Item, carried: Item, starts: Tensor
) -> tuple[Item, Item]:
    """Return what was carried before each segment, [B, N, ...], and after the last, [B, ...].

    join(a, b): a, then b; associative. carried [B, ...]: from before the first segment. starts
    [B, N] bool: nothing before this segment counts for it or later ones (before a segment that
    starts, the result is what was there: the caller knows what a document begins with).
    """
    found = tuple(
        torch.cat((old.unsqueeze(1), new), 1) for old, new in zip(carried, items, strict=True)
    )
    fresh = torch.cat((torch.ones_like(starts[:, :1]), starts), 1)
    step, count = 1, fresh.shape[1]
    while step < count:
        earlier, later = (tuple(x[:, part] for x in found) for part in _parts(step))
        here = fresh[:, step:]
        joined = tuple(
            torch.where(_like(here, new), new, both)
            for new, both in zip(later, join(earlier, later), strict=True)
        )
        found = tuple(
            torch.cat((x[:, :step], both), 1) for x, both in zip(found, joined, strict=True)
        )
        fresh = torch.cat((fresh[:, :step], here | fresh[:, :-step]), 1)
        step *= 2
    return tuple(x[:, :-1] for x in found), tuple(x[:, -1] for x in found)


def _parts(step: int) -> tuple[slice, slice]:
    return slice(None, -step), slice(step, None)


def _like(flags: Tensor, x: Tensor) -> Tensor:
    """Flags [B, N] shaped to meet x [B, N, ...]."""
    return flags.reshape(flags.shape + (1,) * (x.dim() - 2))


def where_start(starts: Tensor, begin: Tensor, x: Tensor) -> Tensor:
    """Return begin where starts, else x: starts [B] or [B, N]; begin and x [B, (N,) ...]."""
    return torch.where(starts.reshape(starts.shape + (1,) * (x.dim() - starts.dim())), begin, x)
