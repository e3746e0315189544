"""The helper that starts ranks: what fails or hangs in a rank fails the test."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from train.checking import ranks
from train.checking.ranks import RankFailure, run_alone, run_ranks

pytestmark = pytest.mark.gloo


def rank_and_sum() -> tuple[int, float]:
    mine = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(mine)
    return dist.get_rank(), mine.item()


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_ranks(3, rank_and_sum) == [(0, 6.0), (1, 6.0), (2, 6.0)]


def broken_on_the_last() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("the last rank is broken")
    dist.barrier()  # its peers wait for it


def test_a_failing_rank_fails_the_test_with_its_traceback() -> None:
    began = time.monotonic()
    with pytest.raises(RankFailure, match="the last rank is broken") as failure:
        run_ranks(2, broken_on_the_last)
    assert "in broken_on_the_last" in str(failure.value)
    assert time.monotonic() - began < ranks.TIMEOUT_S / 2  # it did not wait for the peers


def failing_assertion() -> None:
    assert dist.get_rank() != 0, "zero"


def test_an_assertion_on_a_rank_fails_the_test() -> None:
    with pytest.raises(RankFailure, match="zero"):
        run_ranks(2, failing_assertion)


def hanging_on_the_last() -> None:
    if dist.get_rank() == 1:
        time.sleep(3600)


def test_a_rank_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "TIMEOUT_S", 10)
    began = time.monotonic()
    with pytest.raises(RankFailure, match=r"ranks \[1\] did not answer"):
        run_ranks(2, hanging_on_the_last)
    assert time.monotonic() - began < 60


def lost() -> None:
    os._exit(7)


def test_a_rank_that_vanishes_is_named_at_once() -> None:
    with pytest.raises(RankFailure, match=r"ranks \[0\] ended without an answer, exit codes \[7\]"):
        run_alone(lost)


def lost_on_the_last() -> None:
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def test_a_rank_that_vanishes_is_named_before_what_its_peers_say() -> None:
    with pytest.raises(RankFailure, match=r"^ranks \[1\] ended without an answer"):
        run_ranks(2, lost_on_the_last)
