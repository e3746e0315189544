"""No rank goes on, or fails, alone."""

from typing import Any

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks
from train.agree import SomeRankFailed, of_all, of_first, together

pytestmark = pytest.mark.gloo


def failing_on(ranks: set[int], error: Exception) -> Any:
    def work() -> int:
        if dist.get_rank() in ranks:
            raise error
        return dist.get_rank()

    return work


def each_does(ranks: set[int], error: Exception) -> tuple[Any, dict[int, str] | None, Any]:
    try:
        return together(failing_on(ranks, error)), None, None
    except SomeRankFailed as failed:
        assert failed.__cause__ is failed.own  # its traceback is shown
        return str(failed), dict(failed.errors), type(failed.own).__name__


def test_every_rank_keeps_its_own_result() -> None:
    assert run_ranks(3, each_does, set(), ValueError()) == [(rank, None, None) for rank in range(3)]


def test_an_error_of_one_rank_is_raised_on_all_with_its_rank() -> None:
    errors = {1: "disk full"}
    found = run_ranks(3, each_does, {1}, OSError("disk full"))
    assert found[1] == ("rank 1: disk full", errors, "OSError")
    assert found[0] == found[2] == ("rank 1: disk full", errors, "NoneType")


def test_all_ranks_errors_are_told_and_one_without_a_text_by_its_name() -> None:
    found = run_ranks(3, each_does, {0, 2}, KeyError())
    assert {text for text, _, _ in found} == {"rank 0: KeyError; rank 2: KeyError"}


class Unpicklable(Exception):
    """Cannot be made again from its text alone."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(f"{text} {number}")


def test_an_error_that_cannot_be_pickled_is_told() -> None:
    found = run_ranks(2, each_does, {1}, Unpicklable("no", 7))
    assert [text for text, _, _ in found] == ["rank 1: no 7"] * 2


def first_does(ranks: set[int]) -> Any:
    did: list[int] = []

    def work() -> str:
        did.append(dist.get_rank())
        return failing_on(ranks, OSError("away"))() or "rank 0's"

    try:
        return of_first(work), did
    except SomeRankFailed as failed:
        return str(failed), did


def test_only_rank_0_works_and_all_have_what_it_returns() -> None:
    assert run_ranks(3, first_does, {1}) == [("rank 0's", [0]), ("rank 0's", []), ("rank 0's", [])]


def test_an_error_of_rank_0_is_raised_on_all() -> None:
    assert [text for text, _ in run_ranks(2, first_does, {0})] == ["rank 0: away"] * 2


def on_another_group() -> Any:
    group = dist.new_group(backend="gloo")
    return together(dist.get_rank, group), of_first(dist.get_rank, group), of_all("me", group)


def test_another_group_than_trainings_may_carry_it() -> None:
    assert run_ranks(2, on_another_group) == [(rank, 0, ["me", "me"]) for rank in range(2)]


def in_pairs() -> list[int]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return of_all(dist.get_rank(), pairs[dist.get_rank() // 2])


def test_a_group_of_some_ranks_is_asked_for_its_own() -> None:
    assert run_ranks(4, in_pairs) == [[0, 1], [0, 1], [2, 3], [2, 3]]
