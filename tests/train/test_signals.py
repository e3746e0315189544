"""A stop request: remembered at any moment, agreed on by all ranks."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.train.attempts import forked
from train.signals import STOP_SIGNALS, StopRequest

pytestmark = pytest.mark.gloo

CPU = torch.device("cpu")


def agree(rank: int | None, number: signal.Signals) -> tuple[bool, str | None]:
    stop = StopRequest()
    assert not stop.agreed(CPU)
    if dist.get_rank() == rank:  # to this thread: gloo's, made before, would take it any time
        signal.pthread_kill(threading.get_ident(), number)
    return stop.agreed(CPU), stop.received


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("rank", [0, 2])
def test_all_ranks_agree_where_one_was_asked(rank: int, number: signal.Signals) -> None:
    answers = run_ranks(3, agree, rank, number)
    assert [agreed for agreed, _ in answers] == [True] * 3
    assert [received for _, received in answers] == [
        number.name if place == rank else None for place in range(3)
    ]


def test_without_a_signal_nobody_stops() -> None:
    assert run_ranks(2, agree, None, signal.SIGTERM) == [(False, None)] * 2


def interrupt(*numbers: signal.Signals) -> int:
    stop = StopRequest()
    for number in numbers:
        os.kill(os.getpid(), number)
    print("received", stop.received)
    return 0


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with forked(1, tmp_path, interrupt, signal.SIGINT, signal.SIGINT) as attempt:
        assert attempt.wait() == [1]
        assert "KeyboardInterrupt" in attempt.text()


def test_a_second_sigterm_is_the_same_request(tmp_path: Path) -> None:
    with forked(1, tmp_path, interrupt, signal.SIGTERM, signal.SIGTERM) as attempt:
        assert attempt.wait() == [0]
        assert "received SIGTERM" in attempt.text()
