"""What a few dozen right or wrong answers say: intervals of 95 %, for shares and differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Z = 1.959964  # of the normal distribution, two-sided 95 %

SMALL = 0.1
"""A difference that is surely less than this is called none."""

Verdict = Literal["yes", "no", "unclear"]


class Share(NamedTuple):
    """A share of n trials, or a difference of two, with its interval."""

    value: float
    low: float
    high: float


def share(right: int, n: int) -> Share:
    """Return right / n with Wilson's score interval; n = 0 says nothing: [0, 1], value nan."""
    if n == 0:
        return Share(math.nan, 0.0, 1.0)
    value, z2 = right / n, Z * Z
    middle = (value + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(value * (1 - value) / n + z2 / (4 * n * n))
    return Share(value, max(0.0, middle - half), min(1.0, middle + half))


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Share:
    """Return the share right in `first` less that in `second`, of the same trials.

    Newcombe's score interval for paired shares (Statistics in Medicine 17, 1998, method 10): it
    keeps its width where all trials agree, where a normal or a bootstrap one would shrink to
    nothing. The trials are taken as independent of each other.
    """
    n = len(first)
    assert n == len(second)
    if n == 0:
        return Share(math.nan, -1.0, 1.0)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    only_first, only_second = sum(first) - both, sum(second) - both
    neither = n - both - only_first - only_second
    p, q = share(sum(first), n), share(sum(second), n)
    correlation = _correlation(both, only_first, only_second, neither)

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    value = p.value - q.value
    low = value - half(p.value - p.low, q.high - q.value)
    high = value + half(p.high - p.value, q.value - q.low)
    return Share(value, max(-1.0, low), min(1.0, high))


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    margins = (both + only_first) * (only_second + neither)
    margins *= (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    product = both * neither - only_first * only_second
    if product > 0:  # continuity, as in method 10
        n = both + only_first + only_second + neither
        product_or_none = max(product - n / 2, 0.0)
        return product_or_none / math.sqrt(margins)
    return product / math.sqrt(margins)


def verdict(differences: Sequence[Share], n: int) -> Verdict:
    """Say whether all the differences are above 0, or one is none (under SMALL), or neither.

    Fewer than 6 trials are never enough: even all of them one way come by chance once in 32.
    """
    if n < 6:
        return "unclear"
    if all(difference.low > 0 for difference in differences):
        return "yes"
    if any(difference.high < SMALL for difference in differences):
        return "no"
    return "unclear"
