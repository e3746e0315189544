"""What ranks agree on before any of them goes on: an error or a value of one alone is a hang.

All ranks of a group call these together (None: all ranks there are; errors name the group's own
numbers). What failed is told as text, because not every exception survives being pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class SomeRankFailed(Exception):
    """What failed, raised on all ranks: `errors` by rank, and `own`, if it failed here too."""

    def __init__(self, errors: Mapping[int, str], own: Exception | None) -> None:
        super().__init__("; ".join(f"rank {rank}: {text}" for rank, text in errors.items()))
        self.errors, self.own = errors, own


def of_all(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return what each rank brings, by rank; small, for every rank gets world_size of them."""
    brought: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(brought, mine, group=group)
    return brought


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Return this rank's work() where that of every rank succeeded; else SomeRankFailed on all."""
    result: T | None = None
    own: Exception | None = None
    try:
        result = work()
    except Exception as error:  # whatever it is: the others must not wait for this rank
        own = error
    texts = of_all(None if own is None else str(own) or type(own).__name__, group)
    errors = {rank: text for rank, text in enumerate(texts) if text is not None}
    if errors:
        raise SomeRankFailed(errors, own) from own
    return result  # type: ignore[return-value]


def of_first(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Return on every rank what work() returned on rank 0, the only one that does it.

    Raises SomeRankFailed on all where it failed.
    """
    told: list[Any] = [together(work if dist.get_rank() == 0 else lambda: None, group)]
    dist.broadcast_object_list(told, group=group)
    return told[0]  # type: ignore[no-any-return]
