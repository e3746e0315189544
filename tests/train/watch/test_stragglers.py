"""A slow rank is found by its own work, not by the step that all wait for."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from train.watch.stragglers import SLOW, Spread, Stragglers, compare
from train.watch.waiting import Waiting

NODES = ["a", "a", "b", "b"]


def test_the_slowest_rank_and_its_node_stand_against_the_median() -> None:
    spread = compare([1.0, 1.1, 1.0, 3.0], NODES)
    assert (spread.slowest, spread.slowest_s, spread.median_s) == (3, 3.0, 1.05)
    assert spread.nodes == [("b", 2.0), ("a", 1.05)]
    text = spread.describe(NODES)
    assert "rank 3 on b works 3 s a step, the median rank 1.05 s (2.86 times)" in text
    assert "by node: b 2 s, a 1.05 s" in text


def test_a_rank_is_named_once_and_only_if_it_stays_slow() -> None:
    watcher = Stragglers(NODES, Waiting(), torch.device("cpu"))
    slow = compare([1.0, 1.0, 1.0, 2.0], NODES)
    even = compare([1.0, 1.0, 1.0, SLOW], NODES)
    told = [watcher.news(spread) is not None for spread in (slow, even, slow, slow, slow)]
    assert told == [False, False, False, True, False]
    assert watcher.news(even) is None
    assert [watcher.news(slow) is not None for _ in range(2)] == [False, True]


def work(steps: int, slow: int) -> Spread:
    """Do steps of which one rank's share of work is longer, with a collective at the end."""
    waiting = Waiting()
    with waiting.counting():
        watcher = Stragglers(["n"] * dist.get_world_size(), waiting, torch.device("cpu"))
        for _ in range(steps):
            began = time.perf_counter()
            time.sleep(0.2 if dist.get_rank() == slow else 0.02)
            dist.all_reduce(torch.ones(1))
            watcher.add(time.perf_counter() - began)
        return watcher.compare()


@pytest.mark.gloo
def test_waiting_for_a_slow_rank_is_nobodys_own_work() -> None:
    for spread in run_ranks(3, work, 3, 1):
        assert spread.slowest == 1
        # the others were in the step for as long, and slept a tenth of it
        assert spread.median_s < spread.slowest_s / 2


def test_what_was_waited_for_between_steps_is_no_steps() -> None:
    waiting = Waiting()
    watcher = Stragglers(["n"], waiting, torch.device("cpu"))
    for _ in range(2):
        waiting.seconds += 3.0  # an evaluation's messages
        watcher.begin()
        waiting.seconds += 0.5
        watcher.add(2.0)
    assert watcher._own_s == pytest.approx(2 * 1.5)


def test_counting_ends_with_its_block() -> None:
    work_class: Any = dist.Work
    original = work_class.wait
    with Waiting().counting():
        assert work_class.wait is not original
    assert work_class.wait is original
