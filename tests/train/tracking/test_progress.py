"""Lines in a log, a bar on a terminal."""

import io
import math

import pytest

from train.tracking.progress import (
    Progress,
    Status,
    duration,
    gibibytes,
    percent,
    rate,
    short,
    status_text,
)

STATUS = Status(2.7134, 0.814, 2.9e-4, 1.21e6, 0.413, int(61.2 * 2**30))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_is_the_documented_one() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(50000, first=1190, log_every=10, ranks=32, stream=stream, clock=clock)
    progress.update(1191, STATUS)
    clock.now = 18.0  # 2 s a step
    progress.update(1200, STATUS)
    assert stream.getvalue().splitlines()[-1] == (
        "step 1200/50000 | loss 2.713 | gnorm 0.81 | lr 2.9e-4 | 1.21M tok/s (37.8k/rank)"
        " | MFU 41% | mem 61.2 GiB | eta 1d03h"
    )


def test_a_log_has_the_first_every_nth_and_the_last_step() -> None:
    stream = io.StringIO()
    with Progress(25, log_every=10, stream=stream) as progress:
        for step in range(1, 26):
            progress.update(step, STATUS)
    steps = [line.split(" | ")[0] for line in stream.getvalue().splitlines()]
    assert steps == ["step 1/25", "step 10/25", "step 20/25", "step 25/25"]


def test_no_time_is_promised_after_the_first_step_nor_after_the_last() -> None:
    stream = io.StringIO()
    progress = Progress(3, log_every=1, stream=stream)
    for step in (1, 2, 3):
        progress.update(step, STATUS)
    assert ["eta" in line for line in stream.getvalue().splitlines()] == [False, True, False]


def test_the_first_step_does_not_spoil_the_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, log_every=50, stream=stream, clock=clock)
    clock.now = 500.0  # a slow first step
    progress.update(1, STATUS)
    clock.now = 549.0
    progress.update(50, STATUS)
    assert stream.getvalue().splitlines()[-1].endswith("eta 50s")


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    progress = Progress(2, log_every=1, shown=False, stream=stream)
    progress.update(1, STATUS)
    progress.say("saved")
    progress.close()
    assert stream.getvalue() == ""


def test_a_terminal_has_a_bar_that_events_do_not_break() -> None:
    terminal = Terminal()
    with Progress(4, first=2, stream=terminal) as progress:
        progress.update(3, STATUS)
        progress.say("saved step-00000003")
        progress.update(4, STATUS)
    text = terminal.getvalue()
    assert "saved step-00000003\n" in text
    assert "4/4" in text.rsplit("\r", 1)[-1] and "loss 2.713" in text.rsplit("\r", 1)[-1]


def test_a_skipped_step_says_so_and_what_is_unknown_is_left_out() -> None:
    text = status_text(Status(math.nan, None, 0.0), ranks=4)
    assert text == "loss nan | gnorm not finite: skipped | lr 0"


def test_one_rank_has_no_rate_of_its_own() -> None:
    assert "rank" not in status_text(STATUS, ranks=1)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (987.4, "987"),
        (999.6, "1.00k"),
        (1210, "1.21k"),
        (38_000, "38.0k"),
        (99_960, "100k"),
        (1.21e6, "1.21M"),
        (15e12, "15.0T"),
        (math.inf, "inf"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert short(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (45, "45s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.9, "1h00m"),
        (7500, "2h05m"),
        (86399, "1d00h"),
        (97_200, "1d03h"),
        (math.nan, "?"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rates_shares_and_bytes() -> None:
    assert [rate(x) for x in (2.9e-4, 1e-10, 1.0, 0.0)] == ["2.9e-4", "1.0e-10", "1.0e0", "0"]
    assert [percent(x) for x in (0.413, 0.0996, 0.0321, 0.0004)] == [
        "41%",
        "10%",
        "3.2%",
        "0.0%",
    ]
    assert [gibibytes(x) for x in (310 << 20, 1 << 30)] == ["310 MiB", "1.0 GiB"]
