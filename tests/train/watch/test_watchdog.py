"""When a rank counts as stuck, and the ranks together as hung."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from train.cluster.failure import HUNG
from train.planning import load_cluster, plan
from train.planning.expect import expect
from train.settings.config import load
from train.watch.attempt import limits_of
from train.watch.hang import describe_hang
from train.watch.peers import Report
from train.watch.pulse import Place, Pulse
from train.watch.watchdog import Limits, Watchdog

LIMITS = Limits(first_s=1800.0, floor_s=60.0, factor=5.0)


def pulse_after(*steps_s: float) -> Pulse:
    """Return a pulse after steps of these seconds, in the next step."""
    now = [0.0]
    pulse = Pulse(clock=lambda: now[0])
    for number, seconds in enumerate(steps_s, 1):
        pulse.enter("step", number)
        now[0] += seconds
    pulse.enter("step", len(steps_s) + 1)
    return pulse


def test_until_two_steps_are_measured_the_configured_limit_holds() -> None:
    assert LIMITS.limit_s(pulse_after()) == 1800
    assert LIMITS.limit_s(pulse_after(1680.0)) == 1800


def test_until_then_no_step_that_the_plan_expects_is_too_long() -> None:
    config = load("configs/pretrain_8b.yaml", world_size=64)
    assert limits_of(config).first_s == limits_of(config, 25.0).first_s == 1800
    assert limits_of(config, 720.0).first_s == 3600


def test_the_plan_expects_more_of_a_slower_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = load("configs/pretrain_8b.yaml", world_size=64)
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", None)
    h100, a100, cpu = (expect(config, 128256, 64, name) for name in names)
    assert h100 == plan(config, load_cluster("h100"), 8, 8)
    assert h100.time.total < a100.time.total < cpu.time.total
    assert expect(config, 128256, 64, "NVIDIA Unheard-of") == a100


def test_then_a_multiple_of_the_slowest_step_and_never_less_than_the_floor() -> None:
    assert LIMITS.limit_s(pulse_after(1.0, 2.0)) == 60
    # a step of 12 minutes after a first one of 28 is not killed after 10, or 30
    assert LIMITS.limit_s(pulse_after(1680.0, 720.0)) == 5 * 1680
    assert LIMITS.limit_s(pulse_after(*[720.0] * 3)) == 3600


def test_a_slow_step_is_forgotten_after_fifty() -> None:
    assert LIMITS.limit_s(pulse_after(1680.0, *[20.0] * 50)) == 100


@pytest.mark.parametrize("phase", ["data", "save", "evaluate", "finish"])
def test_outside_of_steps_the_configured_limit_holds_on(phase: str) -> None:
    pulse = pulse_after(1.0, 1.0, 1.0)
    pulse.enter(phase, 4)
    assert LIMITS.limit_s(pulse) == 1800


def test_torchs_own_timeout_stays_behind_the_watchdogs() -> None:
    assert LIMITS.backstop_s(pulse_after(1.0, 1.0)) == 3600
    assert LIMITS.backstop_s(pulse_after(720.0, 720.0)) == 7200


class Board:
    """Peers that share a dictionary instead of a store."""

    def __init__(self, rank: int, reports: dict[int, Report]) -> None:
        self.rank, self.world_size, self.reports = rank, 2, reports
        self.told = threading.Event()

    def publish(self, report: Report) -> None:
        self.reports[report.rank] = report

    def read(self) -> dict[int, Report]:
        return dict(self.reports)

    def tell_reported(self) -> None:
        self.told.set()

    def reported(self) -> bool:
        return self.told.is_set()


class Lost(Board):
    """Peers whose store is gone."""

    def publish(self, report: Report) -> None:
        raise RuntimeError("Connection reset")

    def read(self) -> dict[int, Report]:
        raise RuntimeError("Connection reset")

    def tell_reported(self) -> None:
        raise RuntimeError("Connection reset")


def other(*, still_s: float) -> Report:
    return Report(1, "b", Place("data", 3), 1, time.time(), still_s, 1.0)


def watch(board: Board) -> tuple[Watchdog, list[str], list[int]]:
    said: list[str] = []
    codes: list[int] = []
    dog = Watchdog(
        Pulse(),
        board,  # type: ignore[arg-type]
        Limits(0.2, 0.2, 5.0),
        node="a",
        report=lambda text, step: said.append(text),
        end=codes.append,
    )
    return dog, said, codes


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_silent_rank_ends_the_job_and_is_the_suspect() -> None:
    _, said, codes = watch(Board(0, {1: other(still_s=0.0)}))
    wait_until(lambda: bool(codes))
    assert codes == [HUNG]
    assert "suspect: rank 1 on b is silent" in said[0]


def test_while_a_rank_is_within_its_limit_the_others_wait_for_it() -> None:
    board = Board(0, {})
    dog, said, codes = watch(board)
    number = 0
    until = time.monotonic() + 1.5  # some thirty intervals, each beyond rank 0's limit but a few
    while time.monotonic() < until:
        number += 1
        board.reports[1] = replace(other(still_s=0.5), number=number)
        time.sleep(0.02)
    assert board.reports[0].stuck and not codes and not said
    wait_until(lambda: bool(codes))  # it speaks no more
    dog.stop()


def test_a_lost_store_does_not_keep_a_rank_waiting() -> None:
    _, said, codes = watch(Lost(0, {}))
    wait_until(lambda: bool(codes))
    assert codes == [HUNG] and "store does not answer" in said[0]


def test_the_first_rank_that_lives_speaks_and_the_others_wait_for_it() -> None:
    board = Board(0, {1: other(still_s=5.0)})
    board.rank = 1
    board.reports = {0: replace(other(still_s=5.0), rank=0)}
    _, said, codes = watch(board)
    time.sleep(0.6)
    assert not codes  # rank 0 is to report
    board.told.set()
    wait_until(lambda: bool(codes))
    assert not said


def test_progress_keeps_a_watchdog_quiet() -> None:
    board = Board(0, {1: other(still_s=5.0)})
    dog, said, codes = watch(board)
    for _ in range(60):
        dog.pulse.layer(0, "forward")
        time.sleep(0.02)
    dog.stop()
    assert not codes and not said


def test_a_report_survives_the_store() -> None:
    place = Place("step", 3, 1, (0, 3), 2, "backward")
    report = Report(4, "n", place, 7, 1.5, 2.0, 3.0, "all_reduce", ("0: x",))
    assert Report.from_text(report.to_text()) == report
    assert str(place) == "step 3, micro-batch 1, segments 0 to 3, backward of layer 2"


def test_of_many_ranks_only_those_that_differ_are_listed() -> None:
    place = Place("step", 3)
    usual = [
        Report(rank, "n", place, 1, 0.0, 9.0, 3.0, "all_reduce over x, a.py:1 in f")
        for rank in range(512)
    ]
    odd = replace(usual[200], waits="no collective, a.py:7 in g")
    text = describe_hang([*usual[:200], odd, *usual[201:]], 512)
    assert "suspect: rank 200 on n is in no collective, a.py:7 in g" in text
    assert "511 ranks are where rank 0 is" in text
    assert len(text.splitlines()) < 10


def test_a_rank_that_never_spoke_is_named() -> None:
    mine = Report(0, "n", Place("start", 0), 1, 0.0, 9.0, 3.0, "barrier, a.py:1 in f")
    assert "ranks 1, 2 never said anything" in describe_hang([mine], 3)
