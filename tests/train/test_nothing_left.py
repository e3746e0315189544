"""A run with no step left to do says so, and evaluates nothing again."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.train.attempts import finish
from tests.train.tiny import Shards, tiny
from train.checkpoints.manifest import newest_manifest
from train.settings.config import Config, ConfigError, validate
from train.starting.fork import Data, plan_fork
from train.tracking.timeline import Timeline, read_events

pytestmark = pytest.mark.gloo

STEPS = 4


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, shards: Shards) -> tuple[dict[str, Any], str]:
    """Return the values of a finished run, and what it said."""
    folder: Path = tmp_path_factory.mktemp("ended") / "run"
    raw = tiny(folder, shards, train__steps=STEPS, checkpoint__every=2)
    return raw, finish(1, validate(raw))


def with_steps(raw: dict[str, Any], steps: int) -> Config:
    return validate({**raw, "train": {**raw["train"], "steps": steps}})


def test_the_hint_of_a_finished_run_names_steps_above_its_own(
    ended: tuple[dict[str, Any], str],
) -> None:
    (steps,) = re.findall(r"continue .*train\.steps=(\d+)", ended[1])
    assert int(steps) > STEPS


@pytest.mark.parametrize("mark", ["kept", "deleted, as a job does when it begins"])
def test_a_finished_run_says_that_nothing_is_left_and_evaluates_nothing(
    ended: tuple[dict[str, Any], str], mark: str
) -> None:
    config = with_steps(ended[0], STEPS)
    done = config.run_dir / "DONE"
    if mark != "kept":
        done.unlink()
    before = read_events(config.run_dir)
    text = finish(1, config)
    assert "nothing left to train: step 4 of 4; give train.steps=8, or another number above" in text
    assert "valid/loss" not in text and "continue" not in text
    assert done.read_text() == f"{STEPS}\n"
    assert read_events(config.run_dir) == before


def test_fewer_steps_than_are_done_are_told_and_leave_the_run_as_it_is(
    ended: tuple[dict[str, Any], str],
) -> None:
    config = with_steps(ended[0], 3)
    saved = (config.run_dir / "config.yaml").read_text()
    text = finish(1, config)
    assert "nothing left to train: step 4, train.steps=3; give train.steps=8" in text
    assert "valid/loss" not in text
    assert (config.run_dir / "DONE").read_text() == f"{STEPS}\n"  # or a job would start anew
    assert (config.run_dir / "config.yaml").read_text() == saved


def test_a_run_whose_end_was_cut_short_is_evaluated_and_finished(
    tmp_path: Path, shards: Shards
) -> None:
    config = validate(tiny(tmp_path / "run", shards, train__steps=3))
    finish(1, config)
    (config.run_dir / "events.jsonl").unlink()
    Timeline(config.run_dir, writes=True).add("saved", 3, "saved")
    (config.run_dir / "DONE").unlink()
    text = finish(1, config)
    assert "nothing left" not in text and "step 3 | valid/loss " in text
    assert (config.run_dir / "DONE").exists()


def test_a_fork_without_a_step_to_do_is_refused(
    ended: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    config = with_steps(ended[0], STEPS)
    config = config.model_copy(update={"train": config.train.model_copy(update={"lr": 1e-4})})
    manifest = newest_manifest(config.run_dir / "checkpoints")
    assert manifest is not None
    data = Data(manifest.data, manifest.vocab_size, manifest.tokenizer_sha256 or "")
    with pytest.raises(
        ConfigError, match="step 4 of .*leaves nothing to train; give train.steps=8"
    ):
        plan_fork(config, "slower", data)
    assert not config.run_dir.with_name("slower").exists()
