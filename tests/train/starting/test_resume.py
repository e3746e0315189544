"""2n steps equal n steps, kill -9, and n more, bit for bit; stopping by a signal; finishing."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.attempts import (
    Attempt,
    assert_same_bits,
    checkpoint_names,
    finish,
    forked,
    launched,
    losses,
    pretrain_holding,
    read_rows,
    tensors_of,
)
from tests.train.tiny import Shards, tiny
from train.settings.config import Config, validate

pytestmark = pytest.mark.gloo

HALF = 4
STEPS = 2 * HALF
TWO_OF_EACH: dict[str, object] = {"train__bptt_len": 32}
"""Two BPTT windows a sample; with two lanes a rank and micro_batch 1, two micro-batches."""

TP_CP: dict[str, object] = {"parallel__tp": 2, "parallel__cp": 2}


def pair(tmp_path: Path, shards: Shards, **changes: object) -> tuple[Config, Config]:
    """Return the configurations of a run to interrupt and of one that is not, nor ever saves."""
    settings = {"train__steps": STEPS, "checkpoint__every": HALF} | changes
    broken = validate(tiny(tmp_path / "broken", shards, **settings))
    whole = tiny(tmp_path / "whole", shards, **{**settings, "checkpoint__every": STEPS})
    return broken, validate(whole)


def wait_for_checkpoint(attempt: Attempt, run_dir: Path, step: int) -> None:
    """Return once the checkpoint of a step, written beside training, is there."""
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    attempt.wait_for(lambda: step == 0 or path.exists())


def kill_while_at(config: Config, size: int, step: int) -> None:
    """Start the run, and kill every rank once this step's row is written, before anything else."""
    with forked(size, config.run_dir, pretrain_holding, config, step) as attempt:
        attempt.wait_for_rows(step)
        every = config.checkpoint.every
        wait_for_checkpoint(attempt, config.run_dir, step // every * every)
        attempt.kill()
        assert attempt.codes == dict.fromkeys(attempt.ranks, -signal.SIGKILL)


MATRIX: dict[str, tuple[int, dict[str, object]]] = {
    "dp2-zero1-fp32": (2, {"parallel__zero": 1} | TWO_OF_EACH),
    "dp2-zero2-fp32": (2, {"parallel__zero": 2} | TWO_OF_EACH),
    "dp2-zero3-fp32": (2, {"parallel__zero": 3} | TWO_OF_EACH),
    "dp2-zero1-bf16": (2, {"parallel__zero": 1, "train__precision": "bf16"} | TWO_OF_EACH),
    "dp2-zero3-bf16": (2, {"parallel__zero": 3, "train__precision": "bf16"} | TWO_OF_EACH),
    "tp2-cp2-zero1-fp32": (4, {"parallel__zero": 1} | TP_CP),
    "tp2-cp2-zero3-bf16": (4, {"parallel__zero": 3, "train__precision": "bf16"} | TP_CP),
    "one-window": (1, {"model__memory": {"name": "window", "segments": 2}}),
    "one-no-memory": (1, {"model__memory": {"name": "none"}, "data__workers": 2}),
}


FAST = ("dp2-zero3-bf16", "tp2-cp2-zero1-fp32", "one-window")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MATRIX],
)
def test_a_killed_run_goes_on_bit_for_bit(name: str, tmp_path: Path, shards: Shards) -> None:
    size, changes = MATRIX[name]
    broken, whole = pair(tmp_path, shards, **changes)
    kill_while_at(broken, size, HALF + 2)
    assert checkpoint_names(broken.run_dir) == ["latest", f"step-{HALF:08d}"]
    text = finish(size, broken)
    assert f"resumed at step {HALF}" in text
    finish(size, whole)
    assert_same_bits(broken.run_dir, whole.run_dir, STEPS)


def test_memory_is_carried_across_the_kill(tmp_path: Path, shards: Shards) -> None:
    # or the equality above would say nothing of it
    broken, _ = pair(tmp_path, shards)
    kill_while_at(broken, 1, HALF + 1)
    saved = tensors_of(broken.run_dir, HALF)["rank-00000.safetensors"]
    ages = [saved[f"memory/layers/0/window/age@{lane}"].item() for lane in range(4)]
    assert max(ages) > 4  # segments of one document: more than a sample has
    assert all(
        saved[f"memory/layers/1/parts/fam/slots@{lane}"].abs().sum() > 0 for lane in range(4)
    )


def test_random_state_passing_goes_on_bit_for_bit(tmp_path: Path, shards: Shards) -> None:
    memory = {"name": "fam", "slots": 4, "window": 1, "random_state_passing": 0.5}
    broken, whole = pair(tmp_path, shards, model__memory=memory, **TWO_OF_EACH)
    kill_while_at(broken, 2, HALF + 1)
    assert "passed/0/fam/slots" in tensors_of(broken.run_dir, HALF)["rank-00000.safetensors"]
    finish(2, broken)
    finish(2, whole)
    assert_same_bits(broken.run_dir, whole.run_dir, STEPS)


def pretrain_drawing(config: Config, hold: int) -> int:
    """Train, a random number added to every loss that is logged."""
    from train.reporting import Reporter

    record = Reporter.step

    def draw(self: Any, state: Any, result: Any, seconds: float) -> None:
        record(self, state, result._replace(loss=torch.rand(()).item()), seconds)

    Reporter.step = draw  # type: ignore[method-assign]
    return pretrain_holding(config, hold)


def test_random_numbers_go_on(tmp_path: Path, shards: Shards) -> None:
    # nothing in a step draws any yet, so this draws some
    broken, whole = pair(tmp_path, shards)
    with forked(1, broken.run_dir, pretrain_drawing, broken, HALF + 1) as attempt:
        attempt.wait_for_rows(HALF + 1)
        wait_for_checkpoint(attempt, broken.run_dir, HALF)
        attempt.kill()
    for config in (broken, whole):
        with forked(1, config.run_dir, pretrain_drawing, config, 0) as attempt:
            assert attempt.wait() == [0], attempt.text()
    assert_same_bits(broken.run_dir, whole.run_dir, STEPS)


def test_a_run_killed_twice_goes_on_bit_for_bit(tmp_path: Path, shards: Shards) -> None:
    broken, whole = pair(tmp_path, shards, checkpoint__every=2)
    for step in (3, 7):
        kill_while_at(broken, 1, step)
    finish(1, broken)
    finish(1, whole)
    assert_same_bits(broken.run_dir, whole.run_dir, STEPS)


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    tmp_path: Path, shards: Shards
) -> None:
    broken, whole = pair(tmp_path, shards)
    kill_while_at(broken, 1, HALF - 1)
    finish(1, broken)
    finish(1, whole)
    assert_same_bits(broken.run_dir, whole.run_dir, STEPS)


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path, shards: Shards) -> None:
    broken, _ = pair(tmp_path, shards)
    kill_while_at(broken, 1, HALF + 2)
    log = broken.run_dir / "log.jsonl"
    with log.open("a") as file:
        file.write('{"step": 7, "loss"')  # the crash cut a row short
    with forked(1, broken.run_dir, pretrain_holding, broken, HALF + 1) as attempt:
        attempt.wait_for(lambda: "resumed at step" in attempt.text())
        attempt.wait_for(lambda: read_rows(broken.run_dir)[-1]["step"] == HALF + 1)
    assert [row["step"] for row in read_rows(broken.run_dir)] == [1, 2, 3, 4, 5]


def stop_at(config: Config, size: int, step: int, number: signal.Signals, rank: int) -> str:
    """Send the signal to one rank while all stand at this step; return what was printed."""
    with forked(size, config.run_dir, pretrain_holding, config, step) as attempt:
        attempt.wait_for_rows(step)
        os.kill(attempt.ranks[rank], number)
        (config.run_dir / "go").touch()
        assert attempt.wait() == [0] * size, attempt.text()
        return attempt.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_saves_at_the_boundary_and_ends_all_well(
    number: signal.Signals, tmp_path: Path, shards: Shards
) -> None:
    config, _ = pair(tmp_path, shards)
    text = stop_at(config, 2, HALF - 1, number, rank=1)
    assert checkpoint_names(config.run_dir) == ["latest", f"step-{HALF - 1:08d}"]
    assert not (config.run_dir / "DONE").exists()
    assert f"stopped at step {HALF - 1}, saved; continue with: " in text


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, shards: Shards) -> None:
    broken, whole = pair(tmp_path, shards, **TWO_OF_EACH)
    stop_at(broken, 2, HALF - 1, signal.SIGTERM, rank=0)
    finish(2, broken)
    finish(2, whole)
    assert_same_bits(broken.run_dir, whole.run_dir, STEPS)


def test_a_signal_in_the_last_step_leaves_the_last_evaluation_to_the_next_attempt(
    tmp_path: Path, shards: Shards
) -> None:
    config, _ = pair(tmp_path, shards)
    stop_at(config, 1, STEPS, signal.SIGTERM, rank=0)
    assert not (config.run_dir / "DONE").exists()
    assert checkpoint_names(config.run_dir)[-1] == f"step-{STEPS:08d}"
    finish(1, config)
    assert (config.run_dir / "DONE").read_text() == f"{STEPS}\n"


def test_a_finished_run_started_again_does_no_step(tmp_path: Path, shards: Shards) -> None:
    _, config = pair(tmp_path, shards)
    finish(1, config)
    before = (losses(config.run_dir), tensors_of(config.run_dir, STEPS).keys())
    log = (config.run_dir / "log.jsonl").read_text()
    saved = manifest_time(config)
    finish(1, config)
    assert (losses(config.run_dir), tensors_of(config.run_dir, STEPS).keys()) == before
    assert (config.run_dir / "log.jsonl").read_text() == log  # times too: no row was redone
    assert manifest_time(config) == saved
    assert (config.run_dir / "DONE").exists()


def manifest_time(config: Config) -> int:
    path = config.run_dir / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json"
    return path.stat().st_mtime_ns


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path, shards: Shards) -> None:
    raw = tiny(tmp_path / "run", shards, train__steps=3)
    finish(1, validate(raw))
    first = losses(tmp_path / "run")
    raw["train"]["steps"] = 4
    finish(1, validate(raw))
    assert losses(tmp_path / "run")[:3] == first
    assert len(losses(tmp_path / "run")) == 4
    assert (tmp_path / "run/DONE").read_text() == "4\n"


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_goes_on_in_another_precision(
    before: str, after: str, tmp_path: Path, shards: Shards
) -> None:
    raw = tiny(tmp_path / "run", shards, train__steps=HALF, train__precision=before)
    finish(1, validate(raw))
    raw["train"] |= {"steps": HALF + 2, "precision": after}
    finish(1, validate(raw))
    found = [loss for _, loss, _, _ in losses(tmp_path / "run")]
    assert max(found[HALF:]) < 1.05 * found[HALF - 1]  # neither weights nor memory are new


# As users start it: torchrun, and the command line.


def kill_launched(size: int, folder: Path, raw: dict[str, Any], half: int) -> None:
    with launched(size, folder, raw) as attempt:
        attempt.wait_for_rows(half + 1)
        wait_for_checkpoint(attempt, Path(raw["run_dir"]), half)
        attempt.kill()
    run_dir = Path(raw["run_dir"])
    assert checkpoint_names(run_dir) == ["latest", f"step-{half:08d}"], "the kill came too late"


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        pytest.param(2, {"train__precision": "bf16"} | TWO_OF_EACH, id="dp2"),
        pytest.param(4, TP_CP, id="tp2-cp2", marks=pytest.mark.slow),
        pytest.param(4, {"parallel__zero": 3} | TP_CP, id="tp2-cp2-3", marks=pytest.mark.slow),
    ],
)
def test_under_torchrun_a_killed_run_goes_on_bit_for_bit(
    size: int, changes: dict[str, object], tmp_path: Path, shards: Shards
) -> None:
    half = 15  # long enough that the kill meets the second half
    settings = {"train__steps": 2 * half, "checkpoint__every": half} | changes
    raw = tiny(tmp_path / "run", shards, **settings)
    kill_launched(size, tmp_path / "launch", raw, half)
    with launched(size, tmp_path / "launch", raw) as attempt:
        assert attempt.wait() == 0, attempt.text()
    whole = tiny(tmp_path / "whole", shards, **{**settings, "checkpoint__every": 2 * half})
    finish(size, validate(whole))
    assert_same_bits(tmp_path / "run", tmp_path / "whole", 2 * half)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_under_torchrun_a_signal_to_the_ranks_ends_all_well(
    number: signal.Signals, tmp_path: Path, shards: Shards
) -> None:
    raw = tiny(tmp_path / "run", shards, train__steps=3000, checkpoint__every=3000)
    with launched(2, tmp_path / "launch", raw) as attempt:
        attempt.wait_for_rows(2)
        attempt.signal_ranks(number)
        assert attempt.wait() == 0, attempt.text()
        assert (
            "continue with: torchrun --standalone --no-python --nproc-per-node 2" in attempt.text()
        )
    done = len(read_rows(tmp_path / "run"))
    assert checkpoint_names(tmp_path / "run") == ["latest", f"step-{done:08d}"]
    assert not (tmp_path / "run/DONE").exists()


@pytest.mark.slow
def test_torchrun_told_to_end_lets_the_ranks_save(tmp_path: Path, shards: Shards) -> None:
    raw = tiny(tmp_path / "run", shards, train__steps=3000, checkpoint__every=3000)
    with launched(2, tmp_path / "launch", raw) as attempt:
        attempt.wait_for_rows(2)
        attempt.process.send_signal(signal.SIGTERM)
        attempt.wait()  # its own code says that a signal ended it
    done = len(read_rows(tmp_path / "run"))
    assert checkpoint_names(tmp_path / "run") == ["latest", f"step-{done:08d}"]
