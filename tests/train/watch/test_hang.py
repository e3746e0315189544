"""A job that hangs ends by itself, and says which rank it waited for, and where."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.train.attempts import forked, launched, pretrain
from tests.train.tiny import Shards, tiny
from train.cluster.failure import HUNG
from train.settings.config import Config, validate
from train.tracking.timeline import read_events
from train.watch.status import read_standing

pytestmark = pytest.mark.gloo

SOON: dict[str, Any] = {
    "train__log_every": 1,
    "parallel__timeout_s": 60,
    "parallel__hang_floor_s": 2,
    "parallel__hang_factor": 2,
}


def at_step(step: int, rank: int, action: Any) -> None:
    """Do something on one rank as a step's first window begins."""
    from train.watch.pulse import Pulse

    window = Pulse.window

    def then(self: Pulse, *args: int) -> None:
        window(self, *args)
        if self.place().step == step and dist.get_rank() == rank:
            action()

    Pulse.window = then  # type: ignore[method-assign]


def pretrain_stopping(config: Config, step: int, rank: int) -> int:
    at_step(step, rank, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    return pretrain(config)


def pretrain_sleeping(config: Config, step: int, rank: int) -> int:
    at_step(step, rank, lambda: time.sleep(1000))
    return pretrain(config)


def pretrain_skipping_a_collective(config: Config, step: int, rank: int) -> int:
    import train.loop

    count = train.loop.count_targets

    def skip(batches: Any, mesh: Any) -> int:
        skip.step += 1
        return 256 if skip.step == step and mesh.rank == rank else count(batches, mesh)

    skip.step = 0  # type: ignore[attr-defined]
    train.loop.count_targets = skip
    return pretrain(config)


def hang(config: Config, ranks: int, function: Any, step: int, rank: int) -> tuple[list[int], str]:
    """Return exit codes and output; a rank that is stopped is left out, it stands for ever."""
    with forked(ranks, config.run_dir, function, config, step, rank) as attempt:
        attempt.wait_for(lambda: len(attempt.ended()) >= ranks - (function is pretrain_stopping))
        return [attempt.ended()[pid] for pid in attempt.ranks if pid in attempt.ended()], (
            attempt.text()
        )


def test_a_stopped_rank_is_named_with_its_last_place(tmp_path: Path, shards: Shards) -> None:
    config = validate(tiny(tmp_path / "run", shards, parallel__cp=2, **SOON, train__steps=8))
    codes, text = hang(config, 2, pretrain_stopping, 4, 1)
    assert codes == [HUNG]
    assert "HANG at step 4" in text
    assert "suspect: rank 1 on " in text and "is silent since" in text
    # what the other one waits in: the ring of a layer
    assert "rank 0 on" in text and "CONTEXT_PARALLEL_GROUP [ranks 0, 1]" in text
    assert "segments 0 to 3, forward of layer 0" in text
    assert "parallel/ring.py" in text
    (event,) = [event for event in read_events(config.run_dir) if event["kind"] == "hang"]
    assert event["step"] == 4 and "suspect: rank 1" in event["text"]


@pytest.mark.slow
def test_under_torchrun_a_stopped_first_rank_is_named_by_the_other(
    tmp_path: Path, shards: Shards
) -> None:
    raw = tiny(tmp_path / "run", shards, **SOON, train__steps=1000)
    with launched(2, tmp_path / "job", raw) as attempt:
        attempt.wait_for_rows(5)
        (first,) = [
            process
            for process in attempt.processes()
            if process.environ().get("RANK") == "0" and "train.cli" in " ".join(process.cmdline())
        ]
        first.suspend()
        attempt.wait_for(lambda: "what to do" in attempt.text())
        first.kill()  # torchrun would wait 30 s for it
        assert attempt.wait() == 1
        text = attempt.text()
    # stopped at any moment: in a step, or between two, where the other waits for it with its data
    assert re.search(r"\[watchdog of rank 1\] HANG at (data, )?step", text), text
    assert "suspect: rank 0 on " in text and "is silent since" in text
    assert f"exitcode: {HUNG}" in text.replace("exitcode  :", "exitcode:")
    assert read_events(tmp_path / "run")[-1]["kind"] == "hang"
    assert read_standing(tmp_path / "run").state == "hung"


def test_a_rank_that_is_elsewhere_is_told_from_those_that_wait(
    tmp_path: Path, shards: Shards
) -> None:
    config = validate(tiny(tmp_path / "run", shards, **SOON, train__steps=8))
    codes, text = hang(config, 2, pretrain_sleeping, 4, 0)
    assert codes == [HUNG] * 2
    assert "suspect: rank 0 on" in text
    assert "is in no collective, tests/train/watch/test_hang.py" in text
    assert "while others wait in a collective" in text


def test_a_skipped_collective_is_seen_in_the_counts(tmp_path: Path, shards: Shards) -> None:
    config = validate(tiny(tmp_path / "run", shards, **SOON, train__steps=8))
    codes, text = hang(config, 2, pretrain_skipping_a_collective, 4, 1)
    assert codes == [HUNG] * 2, text
    assert "HANG at step 4" in text
    assert "in different collectives" in text
    # the one that skipped it began one less, and waits in the next
    assert "DATA_PARALLEL_GROUP: gloo:all_reduce number 4" in text
    assert "DATA_PARALLEL_GROUP: gloo:all_reduce number 3" in text
    assert "train/loop.py" in text and "in count_targets" in text and "in poison" in text
