"""Ranks for tests: the product's own (see train.checking.ranks), begun a little quicker."""

from collections.abc import Callable
from typing import Any

from train.checking import ranks
from train.checking.ranks import RankFailure

__all__ = ["RankFailure", "run_ranks", "warm"]


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return [function(*args) on rank 0, 1, ...] of one process group."""
    warm()
    return ranks.run_ranks(size, function, *args)


def warm() -> None:
    """Import before the fork what DeepSpeed imports with a process's first engine."""
    import triton  # noqa: F401
