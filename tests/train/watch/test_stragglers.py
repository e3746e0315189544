"""A slow rank is found by its own work, not by the step that all wait for."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from train.watch.stragglers import SLOW, Spread, Stragglers, compare
from train.watch.waiting import HostClock, StreamClock, Waiting

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


class EveryCall(HostClock):
    """A host's clock that is asked as a stream's is: where communication begins, too."""

    begins = True


def work(steps: int, slow: int, clock: HostClock) -> Spread:
    """Do steps of which one rank's share of work is longer, with a collective at the end."""
    waiting = Waiting(clock)
    with waiting.counting():
        watcher = Stragglers(["n"] * dist.get_world_size(), waiting, torch.device("cpu"))
        for _ in range(steps):
            began = time.perf_counter()
            time.sleep(0.2 if dist.get_rank() == slow else 0.02)
            dist.all_reduce(torch.ones(1))
            watcher.add(time.perf_counter() - began)
        return watcher.compare()


@pytest.mark.gloo
@pytest.mark.parametrize("clock", [HostClock(), EveryCall()])
def test_waiting_for_a_slow_rank_is_nobodys_own_work(clock: HostClock) -> None:
    for spread in run_ranks(3, work, 3, 1, clock):
        assert spread.slowest == 1
        # the others were in the step for as long, and slept a tenth of it
        assert spread.median_s < spread.slowest_s / 2


class Hand:
    """A clock that is set by hand, and begins to run where communication does."""

    begins = True

    def __init__(self) -> None:
        self.now, self.other_stream = 0.0, False

    def mark(self) -> float | None:
        return None if self.other_stream else self.now

    def between(self, marks: list[tuple[float, float]]) -> float:
        return sum(end - begin for begin, end in marks)


def test_what_was_waited_for_between_steps_is_no_steps() -> None:
    clock = Hand()
    waiting = Waiting(clock)
    watcher = Stragglers(["n"], waiting, torch.device("cpu"))
    for _ in range(2):
        waiting._marks.append((0.0, 3.0))  # an evaluation's messages
        watcher.begin()
        waiting._marks.append((0.0, 0.5))
        watcher.add(2.0)
    assert watcher._own_s == pytest.approx(2 * 1.5)


def talk(clock: Hand) -> tuple[int, int, int]:
    """Return how often marks were put for: a collective, a batch of messages, another stream."""
    waiting, found = Waiting(clock), []
    x, y = torch.ones(2), torch.empty(2)

    def gather() -> None:
        dist.all_gather_into_tensor(torch.empty(2), torch.ones(1))

    def exchange() -> None:
        other = 1 - dist.get_rank()
        ops = [dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, y, other)]
        for message in dist.batch_isend_irecv(ops):
            message.wait()

    with waiting.counting():
        for action in (gather, exchange):
            action()
            found.append(len(waiting._marks))
            waiting._marks.clear()
        clock.other_stream = True
        gather()
    return found[0], found[1], len(waiting._marks)


@pytest.mark.gloo
def test_a_stream_is_asked_at_every_call_but_in_other_streams() -> None:
    for gathered, exchanged, elsewhere in run_ranks(2, talk, Hand()):
        assert gathered == 2  # begun, waited for
        assert exchanged == 4  # sent, received, each waited for
        assert elsewhere == 0


class Event:
    """Stands for a CUDA event: it has a time once its stream has come by."""

    def __init__(self, at_ms: float) -> None:
        self.at_ms, self.passed = at_ms, False

    def synchronize(self) -> None:
        self.passed = True

    def elapsed_time(self, end: "Event") -> float:
        return end.at_ms - self.at_ms


def test_a_streams_seconds_are_read_once_its_last_event_has_passed() -> None:
    clock = StreamClock.__new__(StreamClock)  # made without a GPU
    pairs: Any = [(Event(0.0), Event(250.0)), (Event(1000.0), Event(1500.0))]
    assert clock.between(pairs) == pytest.approx(0.75)
    assert pairs[-1][1].passed
    assert clock.between([]) == 0.0


def test_counting_ends_with_its_block() -> None:
    work_class: Any = dist.Work
    group_class: Any = dist.ProcessGroup
    originals = vars(work_class)["wait"], vars(group_class)["allreduce"]
    with Waiting(Hand()).counting():
        assert vars(work_class)["wait"] is not originals[0]
        assert vars(group_class)["allreduce"] is not originals[1]
    assert (vars(work_class)["wait"], vars(group_class)["allreduce"]) == originals


def talk_afterwards() -> float:
    with Waiting(Hand()).counting():
        pass
    x = torch.ones(1)
    dist.all_reduce(x)
    dist.barrier()
    return x.item()


@pytest.mark.gloo
def test_ranks_go_on_talking_once_nobody_counts() -> None:
    assert run_ranks(2, talk_afterwards) == [2.0, 2.0]
