"""A small set of combinations in which every pair of values occurs: pairwise testing."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

Combination = dict[str, Any]
Pair = tuple[str, Any, str, Any]


def pairs_of(combination: Combination) -> set[Pair]:
    """Return the pairs of values in one combination; None is no value."""
    given = [(name, value) for name, value in combination.items() if value is not None]
    return {(a, x, b, y) for (a, x), (b, y) in combinations(given, 2)}


def covering(
    candidates: list[Combination], cost: Callable[[Combination], float]
) -> list[Combination]:
    """Return candidates that together hold every pair of any, greedily.

    Dear ones only where no cheaper one adds a pair. Deterministic: of the cheapest that add a pair
    the one that adds most, the first of equals.
    """
    missing: set[Pair] = set().union(*map(pairs_of, candidates))
    found = []
    while missing:
        useful = [c for c in candidates if pairs_of(c) & missing]
        least = min(map(cost, useful))
        cheapest = [c for c in useful if cost(c) == least]
        best = max(cheapest, key=lambda c: len(pairs_of(c) & missing))
        found.append(best)
        missing -= pairs_of(best)
    return found
