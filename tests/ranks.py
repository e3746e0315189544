"""Ranks for tests: the product's own; see train.checking.ranks."""

from train.checking.ranks import RankFailure, run_ranks

__all__ = ["RankFailure", "run_ranks"]
