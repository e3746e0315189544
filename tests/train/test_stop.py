"""A stop is taken in every phase of training, and the next attempt does what it left out."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.attempts import forked, losses, pretrain, read_rows
from tests.train.tiny import Shards, prepare_shards, tiny
from train.settings.config import Config, validate
from train.signals import StopRequest

pytestmark = pytest.mark.gloo

STEPS = {"train__steps": 6, "checkpoint__every": 2, "train__eval_every": 3}


def warned() -> None:
    """Get the signal in this process, here."""
    os.kill(os.getpid(), signal.SIGUSR1)


def in_the_build(rank: int, run_dir: Path) -> None:
    from train import pretrain as module

    build = module.build_from

    def warn_and_build(*args: Any) -> Any:
        warned()
        return build(*args)

    module.build_from = warn_and_build


def in_an_evaluation(rank: int, run_dir: Path) -> None:
    from train.evaluation.measure import _Reader

    call(_Reader, "_segments", 2)


def in_a_save(rank: int, run_dir: Path) -> None:
    from train.checkpoints.saver import Saver

    call(Saver, "_write", 1)


def in_the_data(rank: int, run_dir: Path) -> None:
    from data.loader import _Reader

    if rank == 1:
        read = _Reader.step

        def hang(self: Any, number: int) -> Any:
            if number == 2 and threading.current_thread() is not threading.main_thread():
                while len(read_rows(run_dir)) < 2:  # the ranks are ahead of the data, and wait
                    time.sleep(0.01)
                warned()
                threading.Event().wait()
            return read(self, number)

        _Reader.step = hang  # type: ignore[method-assign]


def call(owner: Any, name: str, number: int) -> None:
    """Warn this process when the function is called for the number-th time."""
    original, calls = getattr(owner, name), []

    def warn_and_call(*args: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            warned()
        return original(*args)

    setattr(owner, name, warn_and_call)


def pretrain_with(config: Config, injected: Callable[[int, Path], None]) -> int:
    """Train on this rank with a warning injected; exit as the command line does."""
    rank = int(os.environ["RANK"])
    if rank == 1 or injected is in_the_data:
        injected(rank, config.run_dir)
    return pretrain(config)


def config_of(folder: Path, shards: Shards) -> Config:
    return validate(tiny(folder, shards, parallel={"cp": 2}, data__workers=1, **STEPS))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, list[tuple[float, ...]]]:
    """Return shards, and the losses of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    shards = prepare_shards(folder)
    config = config_of(folder / "run", shards)
    with forked(2, config.run_dir, pretrain, config) as attempt:
        assert attempt.wait() == [0, 0], attempt.text()
    return shards, losses(config.run_dir)


@pytest.mark.parametrize(
    ("injected", "stops_at"),
    [(in_the_build, 0), (in_an_evaluation, 3), (in_a_save, None), (in_the_data, 2)],
)
def test_one_rank_warned_stops_all_and_the_run_goes_on_as_if_nothing_had_happened(
    injected: Callable[[int, Path], None],
    stops_at: int | None,
    tmp_path: Path,
    alone: tuple[Shards, list[tuple[float, ...]]],
) -> None:
    shards, undisturbed = alone
    config = config_of(tmp_path / "run", shards)
    with forked(2, config.run_dir, pretrain_with, config, injected) as attempt:
        assert attempt.wait() == [0, 0], attempt.text()
        assert "stopped at step" in attempt.text()
    if stops_at is not None:
        assert len(read_rows(config.run_dir)) == stops_at
    assert not (config.run_dir / "DONE").exists()
    with forked(2, config.run_dir, pretrain, config) as attempt:
        assert attempt.wait() == [0, 0], attempt.text()
        said = attempt.text()
    assert losses(config.run_dir) == undisturbed
    if injected is in_an_evaluation:  # what was cut short is done
        assert "step 3 | valid/loss" in said


def test_a_signal_waits_in_the_kernel_and_no_program_that_is_started_dies_of_it() -> None:
    before = {number: signal.getsignal(number) for number in (15, 10, 2)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    try:
        stop = StopRequest()
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(0.2)"],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGUSR1)
        assert child.wait(20) == 0
        child.stdout.close()
        assert not stop.asked()
        warned()
        assert stop.received == "SIGUSR1"
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # forgets the one that waits
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_worker_that_hangs_does_not_keep_a_loader_from_closing() -> None:
    from data.loader import _ahead

    class Hanging:
        def step(self, number: int) -> Any:
            threading.Event().wait()

    steps = _ahead(Hanging(), iter(range(3)), 1, lambda: True)  # type: ignore[arg-type]
    assert list(steps) == []  # and returns
