"""Ranks for tests: the product's own (see train.checking.ranks), begun a little quicker."""

import gc
from collections.abc import Callable
from typing import Any

from train.checking import ranks
from train.checking.ranks import RankFailure

__all__ = ["RankFailure", "begin_lean", "run_ranks", "warm"]


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return [function(*args) on rank 0, 1, ...] of one process group."""
    warm()
    return ranks.run_ranks(size, _run, function, args)


def _run(function: Callable[..., Any], args: Any) -> Any:
    begin_lean()
    return function(*args)


def warm() -> None:
    """Import before the fork what DeepSpeed imports with a process's first engine."""
    import triton  # noqa: F401


def begin_lean() -> None:
    """Let a fork's garbage collections pass over what it has of its parent.

    DeepSpeed asks for one with each engine of stage 3: 0.25 s each, and copies of shared pages.
    """
    gc.freeze()
