"""Intervals: against published numbers, and by how often they hold the truth."""

import numpy as np
import pytest

from train.evaluation.confidence import Share, paired_difference, share, verdict


def trials(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * (both + first) + [False] * (second + neither)
    b = [True] * both + [False] * first + [True] * second + [False] * neither
    return a, b


def test_a_share_has_wilson_s_interval() -> None:
    # 81 of 263: Newcombe, Statistics in Medicine 17 (1998) 857, table I
    assert share(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)
    assert share(16, 16) == pytest.approx((1.0, 0.8064, 1.0), abs=1e-4)
    assert share(0, 20) == pytest.approx((0.0, 0.0, 0.1611), abs=1e-4)
    assert share(0, 0)[1:] == (0.0, 1.0)


def test_a_paired_difference_has_newcombe_s_interval() -> None:
    # 36, 12, 2, 0: Newcombe, Statistics in Medicine 17 (1998) 2635, method 10
    found = paired_difference(*trials(36, 12, 2, 0))
    assert found == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)


def test_differences_mirror() -> None:
    a, b = trials(7, 9, 2, 5)
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert back == pytest.approx((-there.value, -there.high, -there.low))


def test_agreement_of_all_still_leaves_doubt() -> None:
    for counts in ((12, 0, 0, 0), (0, 0, 0, 12)):
        value, low, high = paired_difference(*trials(*counts))
        assert value == 0 and low < -0.1 and high > 0.1


@pytest.mark.parametrize("n", [10, 40])
@pytest.mark.parametrize(
    ("first", "second", "alike"), [(0.9, 0.1, 0.0), (0.5, 0.5, 0.7), (0.3, 0.2, 0.9)]
)
def test_intervals_hold_the_truth(n: int, first: float, second: float, alike: float) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        u = rng.random(n)
        v = np.where(rng.random(n) < alike, u, rng.random(n))
        _, low, high = paired_difference((u < first).tolist(), (v < second).tolist())
        held += low <= first - second <= high
    assert held / 500 > 0.92  # 0.95, three standard errors of 500 less


@pytest.mark.parametrize(
    ("first", "second", "n", "said"),
    [
        ((0.5, 0.2, 0.7), (0.4, 0.1, 0.6), 20, "yes"),
        ((0.5, 0.2, 0.7), (0.0, -0.05, 0.05), 90, "no"),  # another's memory serves as well
        ((0.0, -0.05, 0.05), (0.5, 0.2, 0.7), 90, "no"),  # nothing is gained
        ((0.5, 0.2, 0.7), (0.1, -0.1, 0.3), 20, "unclear"),
        ((1.0, 0.1, 1.0), (1.0, 0.1, 1.0), 5, "unclear"),
        ((0.03, 0.01, 0.05), (0.03, 0.01, 0.05), 5000, "yes"),
    ],
)
def test_the_verdict_needs_both_differences(
    first: tuple[float, ...], second: tuple[float, ...], n: int, said: str
) -> None:
    assert verdict([Share(*first), Share(*second)], n) == said
