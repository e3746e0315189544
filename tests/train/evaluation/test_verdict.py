"""What differences say about a memory, and with what confidence."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from train.evaluation.positions import Condition, Evaluation, Part, PositionLosses, table
from train.evaluation.verdict import Difference, difference, judge, metrics, t_quantile


def losses(
    condition: Condition, *passages: tuple[float, int], first: float = 8.0
) -> PositionLosses:
    """Four tokens of a first segment, then passages in one bucket."""
    parts = tuple(Part(number, 1, *passage) for number, passage in enumerate(passages))
    total, count = sum(loss for loss, _ in passages), sum(n for _, n in passages)
    return PositionLosses(condition, 4, (0, 4, 8), (first, total), (4, count), parts)


def compared(
    shuffled: Sequence[float], off: Sequence[float] | None = None, beyond: float | None = None
) -> Evaluation:
    """Passages of 100 tokens; what each loses with the memory shuffled and off, nats a token."""

    def of(condition: Condition, lost: Sequence[float]) -> PositionLosses:
        return losses(condition, *((100 * (2 + x), 100) for x in lost))

    on = of("on", [0.0] * len(shuffled))
    return Evaluation(
        on=on,
        off=of("off", off or shuffled),
        shuffled=of("shuffled", shuffled),
        beyond=None if beyond is None else of("beyond", [beyond + x for x in shuffled]),
        paired=on,
    )


def used(evaluation: Evaluation) -> str:
    verdict = judge(evaluation)
    assert verdict is not None
    return verdict.used


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # tables of Student's t, 0.975
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (8, 2.306004), (30, 2.042272), (500, 1.964720)],
)
def test_quantiles_of_t_are_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=1e-6)


def test_quantiles_fall_to_the_normal_ones() -> None:
    values = [t_quantile(degrees) for degrees in (*range(1, 40), 499, 500, 501, 10**6)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(1.959964, abs=1e-5)


def test_a_difference_is_over_tokens_and_its_interval_over_passages() -> None:
    on, off = losses("on", (10.0, 10), (20.0, 30)), losses("off", (15.0, 10), (23.0, 30))
    # 0.2 nats a token; without the first passage 0.1, without the second 0.5
    reach = 12.706205 * math.sqrt((0.1**2 + 0.3**2) / 2)
    assert difference(on, off) == Difference(
        pytest.approx(0.2), pytest.approx(0.2 - reach), pytest.approx(0.2 + reach), 2, 40
    )


@pytest.mark.parametrize("sizes", [[200] * 6, [500, 60, 300, 90, 120], [10000] + [100] * 5])
def test_the_interval_holds_the_truth_95_times_in_100(sizes: Sequence[int]) -> None:
    """Passages with effects of their own; 1000 draws, so 0.935 is 2 standard errors below 0.95."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        effects = random.normal(0.1, 0.05, len(sizes))
        on = losses("on", *((2.0 * n, n) for n in sizes))
        other = losses("off", *(((2 + e) * n, n) for n, e in zip(sizes, effects, strict=True)))
        found = difference(on, other)
        assert found is not None and found.low is not None and found.high is not None
        covered += found.low < 0.1 < found.high
    assert covered >= 935


def test_one_passage_has_no_interval_and_none_no_difference() -> None:
    found = difference(losses("on", (1.0, 2)), losses("off", (2.0, 2)))
    assert found == Difference(0.5, None, None, 1, 2)
    assert "no interval" in str(found) and "1 passage" in str(found)
    assert difference(losses("on"), losses("off")) is None


def test_a_bucket_has_a_difference_of_its_own() -> None:
    def of(condition: Condition, late: float) -> PositionLosses:
        parts = (Part(0, 1, 4.0, 4), Part(0, 2, late, 8), Part(1, 2, late, 8))
        return PositionLosses(condition, 4, (0, 4, 8, 16), (1, 4, 2 * late), (4, 4, 16), parts)

    on, off = of("on", 8.0), of("off", 16.0)
    assert difference(on, off, bucket=1) == Difference(0.0, None, None, 1, 4)
    assert difference(on, off, bucket=2) == Difference(1.0, 1.0, 1.0, 2, 16)
    assert difference(on, off, bucket=0) is None


def test_it_is_used_where_another_documents_memory_costs() -> None:
    assert used(compared([0.1, 0.12, 0.09, 0.11])) == "yes"


def test_it_is_not_used_where_another_documents_memory_serves_as_well() -> None:
    evaluation = compared([1e-5, -1e-5, 2e-5, -2e-5], off=[0.1, 0.12, 0.09, 0.11])
    verdict = judge(evaluation)
    assert verdict is not None and verdict.used == "no"
    assert "what is used is not what the document said" in verdict.reason


def test_a_memory_that_changes_nothing_is_not_used() -> None:
    assert used(compared([0.0] * 4)) == "no"
    assert used(compared([1e-7] * 4)) == "no"  # float32 noise, the same in each
    assert used(compared([0.004, -0.004] * 10)) == "no"  # surely next to nothing


def test_a_memory_that_harms_is_not_used() -> None:
    assert used(compared([-0.1, -0.12, -0.09, -0.11])) == "no"


def test_too_little_evidence_is_unclear() -> None:
    assert used(compared([0.1, -0.1, 0.2, -0.15])) == "unclear"
    assert used(compared([0.3])) == "unclear"  # one passage
    assert used(Evaluation(on=losses("on"), off=losses("off"), unshuffled="one lane")) == "unclear"


def test_with_a_window_the_verdict_is_on_what_lies_beyond_it() -> None:
    swapped = [0.1, 0.12, 0.09, 0.11]
    assert used(compared(swapped, beyond=0.0)) == "yes"
    verdict = judge(compared(swapped, beyond=-0.105))
    assert verdict is not None and verdict.used != "yes" and "window" in verdict.reason


def test_without_anything_to_compare_with_there_is_no_verdict() -> None:
    assert judge(Evaluation(on=losses("on", (1.0, 2)))) is None
    assert judge(Evaluation(off=losses("off", (1.0, 2)))) is None


def test_what_is_logged_has_losses_intervals_and_the_verdict() -> None:
    values = metrics(compared([0.1, 0.12, 0.09, 0.11]), "valid/")
    assert values["valid/loss"] < values["valid/loss_memory_shuffled"]
    assert values["valid/memory_used"] == 1
    low, mean, high = (values[f"valid/shuffled_minus_on{end}"] for end in ("_low", "", "_high"))
    assert low < mean < high
    assert mean == pytest.approx(0.105)
    assert all(math.isfinite(value) for value in values.values())
    assert metrics(compared([0.0] * 4), "")["memory_used"] == -1


def test_the_table_compares() -> None:
    on, off = losses("on", (10.0, 1000)), losses("off", (15.0, 1000))
    assert table(Evaluation(on=on, off=off)).splitlines() == [
        "position  tokens  memory on  memory off  off - on",
        "   0 - 3       4     2.0000      2.0000   +0.0000",
        "   4 - 7   1,000     0.0100      0.0150   +0.0050",
        "     all   1,004     0.0179      0.0229   +0.0050",
    ]
    assert table(Evaluation(off=off)).splitlines()[0] == "position  tokens  memory off"


def test_shuffled_is_compared_with_memory_on_over_the_same_tokens() -> None:
    shuffled, paired = losses("shuffled", (3.0, 10)), losses("on", (1.0, 10))
    found = table(Evaluation(losses("on", (100.0, 50)), None, shuffled, paired=paired)).splitlines()
    assert found[0].endswith("shuffled  shuffled - on")
    assert found[2].split()[-1] == "+0.2000"
