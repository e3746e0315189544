"""Two starts in one run folder: the second is refused, and leaves the first alone."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.train.attempts import (
    TIMEOUT_S,
    checkpoint_names,
    forked,
    launched,
    pretrain,
    pretrain_holding,
    read_rows,
)
from tests.train.tiny import Shards, tiny
from train.settings.config import Config, validate
from train.starting.lock import LOCK, hold, release
from train.starting.start import open_run
from train.tracking.timeline import read_events

pytestmark = pytest.mark.gloo


def start_beside(config: Config, fresh: bool) -> int:
    try:
        open_run(config, fresh=fresh)
    except ValueError as error:
        print(error, flush=True)
        return 2
    return 0


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_start_is_refused_and_writes_nothing(
    fresh: bool, tmp_path: Path, shards: Shards
) -> None:
    config = validate(tiny(tmp_path / "run", shards, train__steps=4))
    with forked(1, config.run_dir, pretrain_holding, config, 2) as alive:
        alive.wait_for_rows(2)
        before = sorted(tmp_path.rglob("*")), read_events(config.run_dir)
        with forked(1, config.run_dir, start_beside, config, fresh) as second:
            assert second.wait() == [2]
            text = second.text()
        assert f"process {alive.ranks[0]} on " in text and "trains this run now" in text
        assert (sorted(tmp_path.rglob("*")), read_events(config.run_dir)) == before
        (config.run_dir / "go").touch()
        assert alive.wait() == [0], alive.text()
    assert [row["step"] for row in read_rows(config.run_dir)] == [1, 2, 3, 4]


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path, shards: Shards) -> None:
    config = validate(tiny(tmp_path / "run", shards, train__steps=4))
    with forked(1, config.run_dir, pretrain_holding, config, 2) as alive:
        alive.wait_for_rows(2)
        alive.kill()
    with forked(1, config.run_dir, pretrain, config) as second:
        assert second.wait() == [0], second.text()


def test_a_folder_that_was_set_aside_is_locked_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    hold(run)
    hold(run)
    run.rename(tmp_path / "aside")
    release(run)
    hold(run)
    assert str(os.getpid()) in (run / LOCK).read_text()
    release(run)
    release(run)


def test_ranks_whose_torchrun_is_killed_save_and_end(tmp_path: Path, shards: Shards) -> None:
    raw = tiny(tmp_path / "run", shards, train__steps=3000, checkpoint__every=3000)
    with launched(2, tmp_path / "launch", raw) as attempt:
        attempt.wait_for_rows(2)
        ranks = attempt.processes()[:-1]
        attempt.process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, TIMEOUT_S)
        for process in alive:
            process.kill()
        assert not alive, attempt.text()
    done = len(read_rows(tmp_path / "run"))
    assert 2 <= done < 3000
    assert checkpoint_names(tmp_path / "run") == ["latest", f"step-{done:08d}"]
