"""A network file system goes away for half a minute under a run, which then goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train.attempts import finish, forked, losses, pretrain, read_rows
from tests.train.storage import Storage, why_not
from tests.train.tiny import Shards, tiny
from train.reading.verify import verify
from train.settings.config import Config, validate
from train.tracking.timeline import read_events

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gloo,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

AWAY_S = 30.0
RANKS, STEPS = 2, 400


def settings(folder: Path, shards: Shards) -> Config:
    changes = {"train__steps": STEPS, "checkpoint__every": 20}
    return validate(tiny(folder / "run", shards, **changes))


@pytest.mark.parametrize("fault", [Storage.hang, Storage.lose])
def test_a_run_goes_on_when_its_file_system_is_back(
    fault: object, tmp_path: Path, shards: Shards
) -> None:
    whole = settings(tmp_path, shards)
    finish(RANKS, whole)
    with Storage(tmp_path / "storage") as storage:
        for folder in shards:
            shutil.copytree(folder, storage.path / "shards" / folder.name)
        there = Shards(storage.path / "shards/train", storage.path / "shards/valid")
        config = settings(storage.path, there)
        with forked(RANKS, config.run_dir, pretrain, config) as attempt:
            attempt.wait_for_rows(30)
            assert callable(fault)
            fault(storage, AWAY_S)
            codes, said = attempt.wait(), attempt.text()
        assert codes == [0] * RANKS, said
        assert len(read_rows(config.run_dir)) == STEPS
        assert losses(config.run_dir) == losses(whole.run_dir)
        found = verify([config.run_dir])
        assert found.good, found.sentences
        kinds = [event["kind"] for event in read_events(config.run_dir)]
        assert "not_saved" not in kinds and kinds[-1] == "finished"
        assert ("again in" in said) == (fault is Storage.lose)
