"""Bad steps: found, kept from the weights, skipped or rolled back, and written down."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.history import Range, read_history
from data.ledger import FOLDER
from tests.train.attempts import (
    checkpoint_names,
    forked,
    losses,
    manifest_of,
    pretrain,
    pretrain_holding,
    read_rows,
    same_bits,
    tensors_of,
)
from tests.train.tiny import Shards, tiny
from train.guard import Guard
from train.reading.verify import verify
from train.settings.config import Config, validate
from train.settings.guard import GuardSection
from train.tracking.timeline import read_events

STEADY = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 2.0]
"""Its median distance from the median is 0.025: a standard deviation of 0.037."""


def guard(losses: list[float], **fields: Any) -> Guard:
    return Guard(GuardSection(**{"spike_window": 8, "spike": "skip"} | fields), losses)


# the limit


def test_a_spike_is_far_above_the_median_in_both_measures() -> None:
    by_sigmas = guard(STEADY, spike_sigmas=20, spike_factor=1.1).limit()
    assert by_sigmas == pytest.approx(2.0 + 20 * 1.4826 * 0.025)
    assert guard(STEADY, spike_sigmas=2, spike_factor=1.5).limit() == pytest.approx(3.0)


def test_one_earlier_spike_hardly_moves_the_limit() -> None:
    before = guard(STEADY, spike_factor=1.5).limit()
    assert guard([*STEADY[:-1], 40.0], spike_factor=1.5).limit() < 1.1 * before


def test_nothing_is_a_spike_until_half_a_window_is_known() -> None:
    assert guard(STEADY[:3]).limit() == math.inf
    assert guard(STEADY[:4]).limit() < math.inf


def test_ignore_has_no_limit_and_tell_cuts_nothing() -> None:
    assert guard(STEADY, spike="ignore").limit() == math.inf
    told = guard(STEADY, spike="tell")
    assert told.limit() < math.inf and told.cut() == math.inf
    assert told.judge(9.0, skipped=False, device=torch.device("cpu")) == "spike"
    assert told.judge(2.0, skipped=False, device=torch.device("cpu")) is None


# whole runs


def spoil(config: Config, steps: dict[int, float]) -> None:
    """Multiply the loss of these steps of the attempt, counted from 1, on the last rank."""
    import train.loop

    poison = train.loop.poison
    count = [0]

    def spoiled(loss: Tensor, total: Tensor, mesh: Any, cut: float) -> Tensor:
        count[0] += 1
        if mesh.rank == mesh.world_size - 1:
            total *= steps.get(count[0], 1.0)
        return poison(loss, total, mesh, cut)

    train.loop.poison = spoiled


def pretrain_spoiled(config: Config, steps: dict[int, float]) -> int:
    spoil(config, steps)
    return pretrain(config)


def pretrain_spoiled_holding(config: Config, steps: dict[int, float], hold: int) -> int:
    spoil(config, steps)
    return pretrain_holding(config, hold)


def train(ranks: int, config: Config, steps: dict[int, float]) -> tuple[list[int], str]:
    with forked(ranks, config.run_dir, pretrain_spoiled, config, steps) as attempt:
        return attempt.wait(), attempt.text()


def guarded(folder: Path, shards: Shards, **changes: object) -> Config:
    settings = {"train__steps": 10, "checkpoint__every": 4, "checkpoint__asynchronous": False}
    fields = {"spike_window": 4, "spike_sigmas": 1.0, "spike_factor": 2.0}
    names = {f"train__guard__{name}": value for name, value in fields.items()}
    return validate(tiny(folder, shards, **{**settings, **names, **changes}))


NAN = math.nan


def kinds(config: Config) -> list[tuple[str, int]]:
    """Return the events of bad steps."""
    wanted = ("skipped", "spike", "rolled_back", "failed")
    return [(e["kind"], e["step"]) for e in read_events(config.run_dir) if e["kind"] in wanted]


@pytest.mark.gloo
def test_a_spike_on_one_rank_is_skipped_by_all_and_named(tmp_path: Path, shards: Shards) -> None:
    config = guarded(tmp_path / "run", shards, train__guard__spike="skip", parallel__tp=2)
    codes, text = train(2, config, {6: 10.0})
    assert codes == [0, 0], text
    assert "step 6 skipped: loss " in text and " is a spike (limit " in text
    assert "samples 20 to 23; 1 in a row" in text
    assert kinds(config) == [("skipped", 6)]
    assert manifest_of(config.run_dir, 10)["updates"] == 9
    history = read_history(config.run_dir / FOLDER)
    assert history.passed_over(40) == [Range(20, 24)]


@pytest.mark.gloo
def test_a_told_spike_is_trained_on(tmp_path: Path, shards: Shards) -> None:
    config = guarded(tmp_path / "run", shards, train__guard__spike="tell")
    codes, text = train(1, config, {6: 10.0})
    assert codes == [0]
    assert "step 6: loss " in text and "it was trained on" in text
    assert kinds(config) == [("spike", 6)]
    assert manifest_of(config.run_dir, 10)["updates"] == 10


@pytest.mark.gloo
@pytest.mark.parametrize(("zero", "trouble"), [(1, NAN), (3, 10.0)])
def test_a_rollback_takes_the_old_weights_past_the_samples(
    zero: int, trouble: float, tmp_path: Path, shards: Shards
) -> None:
    policies = {"train__guard__spike": "rollback", "train__guard__nonfinite": "rollback"}
    settings = {**policies, "parallel__zero": zero, "train__steps": 8, "checkpoint__keep": 4}
    config = guarded(tmp_path / "run", shards, **settings)
    codes, text = train(2, config, {7: trouble})
    assert codes == [0, 0], text
    # saved at 4; steps 5 to 7 of 4 lanes are passed
    assert "rolled back to the weights of step 4, going past samples 16 to 27" in text
    assert kinds(config) == [("rolled_back", 7)]
    good, back = (tensors_of(config.run_dir, step) for step in (4, 7))
    for file, tensors in good.items():
        kept = {name: x for name, x in tensors.items() if not name.startswith("memory/")}
        assert kept and all(same_bits(x, back[file][name]) for name, x in kept.items())
        assert not [name for name in back[file] if name.startswith("memory/")]  # it began anew
    assert [manifest_of(config.run_dir, step)["updates"] for step in (4, 7, 8)] == [4, 4, 5]
    assert manifest_of(config.run_dir, 7)["position"] == 28
    # what was undone stands in no curve
    assert [row["step"] for row in read_rows(config.run_dir)] == [1, 2, 3, 4, 8]
    found = verify([config.run_dir])
    assert found.good
    assert "12 of them left no trace in the weights" in found.sentences[1]
    assert "samples 16 to 27 (steps 5 to 7)" in found.sentences[1]


@pytest.mark.gloo
def test_a_kill_after_a_rollback_changes_nothing(tmp_path: Path, shards: Shards) -> None:
    broken, whole = (
        guarded(tmp_path / name, shards, train__guard__nonfinite="rollback", train__steps=8)
        for name in ("broken", "whole")
    )
    codes, text = train(1, whole, {6: NAN})
    assert codes == [0], text
    with forked(1, broken.run_dir, pretrain_spoiled_holding, broken, {6: NAN}, 7) as attempt:
        attempt.wait_for(lambda: read_rows(broken.run_dir)[-1:] != [] and
                         read_rows(broken.run_dir)[-1]["step"] == 7)  # fmt: skip
        attempt.kill()
    codes, text = train(1, broken, {})
    assert codes == [0] and "resumed at step 6" in text
    assert losses(broken.run_dir) == losses(whole.run_dir)
    one, other = (tensors_of(c.run_dir, 8)["rank-00000.safetensors"] for c in (broken, whole))
    assert [name for name in one if not same_bits(one[name], other[name])] == []
    found = verify([broken.run_dir])
    assert found.good and found.values["runs"][0]["passed_over"] == [Range(16, 24)]


@pytest.mark.gloo
def test_rollbacks_in_a_row_stop_the_run(tmp_path: Path, shards: Shards) -> None:
    changes = {"train__guard__nonfinite": "rollback", "train__guard__max_rollbacks": 2}
    config = guarded(tmp_path / "run", shards, **changes)
    codes, text = train(1, config, {5: NAN, 6: NAN, 7: NAN})
    assert codes == [1]
    assert "after 2 rollbacks, each less than checkpoint.every=4 steps after the one before" in text
    assert "train.guard.max_rollbacks=2" in text
    assert checkpoint_names(config.run_dir)[-1] == "step-00000006"
    assert kinds(config) == [("rolled_back", 5), ("rolled_back", 6), ("failed", 7)]
    assert "run tiny failed: FloatingPointError" in text and "what to do:" in text


@pytest.mark.gloo
def test_rollbacks_on_both_sides_of_a_checkpoint_stop_the_run(
    tmp_path: Path, shards: Shards
) -> None:
    changes = {"train__guard__nonfinite": "rollback", "train__guard__max_rollbacks": 1}
    config = guarded(tmp_path / "run", shards, checkpoint__every=4, **changes)
    codes, text = train(1, config, {7: NAN, 9: NAN})
    assert codes == [1] and "after 1 rollbacks" in text


@pytest.mark.gloo
def test_a_checkpoint_interval_forgives_rollbacks(tmp_path: Path, shards: Shards) -> None:
    changes = {"train__guard__nonfinite": "rollback", "train__guard__max_rollbacks": 1}
    config = guarded(tmp_path / "run", shards, **changes)
    codes, text = train(1, config, {5: NAN, 9: NAN})
    assert codes == [0], text
    assert kinds(config) == [("rolled_back", 5), ("rolled_back", 9)]


@pytest.mark.gloo
def test_without_a_checkpoint_a_bad_step_is_skipped(tmp_path: Path, shards: Shards) -> None:
    config = guarded(tmp_path / "run", shards, train__guard__nonfinite="rollback", train__steps=4)
    codes, text = train(1, config, {2: NAN})
    assert codes == [0], text
    assert kinds(config) == [("skipped", 2)]


@pytest.mark.gloo
def test_a_resumed_guard_knows_the_losses_before(tmp_path: Path, shards: Shards) -> None:
    first = guarded(tmp_path / "run", shards, train__guard__spike="skip", train__steps=4)
    assert train(1, first, {})[0] == [0]
    more = guarded(tmp_path / "run", shards, train__guard__spike="skip", train__steps=6)
    codes, text = train(1, more, {1: 10.0})
    assert codes == [0] and "step 5 skipped: loss" in text
