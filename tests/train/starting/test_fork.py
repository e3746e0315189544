"""A run that begins from another one: what it takes along, and what it leaves alone."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenizer import ByteTokenizer
from tests.train.attempts import (
    finish,
    forked,
    losses,
    manifest_of,
    pretrain_forking,
    read_rows,
    tensors_of,
)
from tests.train.faults import flip_bit
from tests.train.runs import longhaul, write
from tests.train.tiny import Shards, prepare_shards, tiny
from train.checkpoints.manifest import read_manifest, verify
from train.checkpoints.names import list_checkpoints
from train.cluster.attempts import begin as begin_attempt
from train.cluster.attempts import end as end_attempt
from train.reading.verify import verify as verify_runs
from train.settings.config import Config, ConfigError, validate
from train.starting.changes import find_changes
from train.starting.fork import Data, begin_fork, plan_fork, what_is_kept
from train.starting.fork_name import PARENT
from train.starting.start import open_run

pytestmark = pytest.mark.gloo

RANKS, STEPS, EVERY = 2, 6, 2


def settings(folder: Path, shards: Shards, **changes: object) -> dict[str, Any]:
    base = {"train__steps": STEPS, "checkpoint__every": EVERY, "train__schedule": "constant"}
    return tiny(folder, shards, **{**base, **changes})


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, shards: Shards) -> Path:
    """Return the folder of a run of six steps; nothing may write there."""
    folder: Path = tmp_path_factory.mktemp("runs") / "parent"
    finish(RANKS, validate(settings(folder, shards)))
    return folder


@pytest.fixture(autouse=True)
def nobody_touches_the_parent(parent: Path) -> Any:
    before = state_of(parent)
    yield
    assert state_of(parent) == before


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "verified.json"]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def start(config: Config, name: str, size: int = RANKS) -> tuple[Path, str]:
    """Fork on so many ranks and train to the end; return the new folder and what was said."""
    folder = config.run_dir.with_name(name)
    with forked(size, folder, pretrain_forking, config, name) as attempt:
        assert attempt.wait() == [0] * size, attempt.text()
        return folder, attempt.text()


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


# what is taken along


def test_a_branch_goes_on_as_the_parent_would(parent: Path, shards: Shards, tmp_path: Path) -> None:
    config = validate(settings(parent, shards, train__steps=10))
    branch, text = start(config, "branch")
    assert f"begins with everything of {parent}/checkpoints/step-00000006 (step 6)" in text
    assert "resumed at step 6" in text
    assert "changed since step 6: train.steps: 6 -> 10" in text
    whole = validate(settings(tmp_path / "whole", shards, train__steps=10))
    finish(RANKS, whole)
    assert losses(branch) == losses(whole.run_dir)  # the parent's steps too
    read = verify_runs([branch, whole.run_dir])
    assert read.good, read.sentences
    assert tensors_of(branch, 10).keys() == tensors_of(whole.run_dir, 10).keys()
    remove(branch)


def test_a_branch_says_where_it_comes_from(parent: Path, shards: Shards) -> None:
    branch, _ = start(validate(settings(parent, shards, train__steps=8)), "origin")
    origin = json.loads((branch / PARENT).read_text())
    assert origin["run"] == str(parent)
    assert origin["checkpoint"] == str(parent / "checkpoints/step-00000006")
    assert (origin["step"], origin["keeps"]) == (6, "everything")
    for checkpoint in list_checkpoints(branch / "checkpoints"):
        assert verify(checkpoint).parent == origin
    assert manifest_of(branch, 8)["config"]["name"] == "origin"
    shown = longhaul("checkpoint", "show", branch / "checkpoints/step-00000008").stdout
    assert re.search(rf"forked from +{parent}/checkpoints/step-00000006, with everything", shown)
    remove(branch)


def test_other_data_begin_at_their_beginning_with_weights_and_moments(
    parent: Path, shards: Shards, tmp_path: Path
) -> None:
    other = prepare_shards(tmp_path, seed=1)
    config = validate(settings(parent, other, train__steps=4))
    child, text = start(config, "other_data")
    assert "begins with weights and moments" in text
    assert [row["step"] for row in read_rows(child)] == [1, 2, 3, 4]
    manifest = manifest_of(child, 4)
    assert (manifest["step"], manifest["updates"]) == (4, STEPS + 4)
    fresh = validate(settings(tmp_path / "fresh", other, train__steps=4))
    finish(RANKS, fresh)
    assert losses(child)[0][1] < 0.9 * losses(fresh.run_dir)[0][1]  # it knows something already
    remove(child)


OTHER = Data("other", 257, ByteTokenizer().sha256)
"""Another corpus, of the same tokenizer."""


def begun(config: Config, name: str, fingerprint: str = OTHER.fingerprint) -> Path:
    """Make a fork's folder without training; return its checkpoint."""
    data = OTHER._replace(fingerprint=fingerprint)
    fork = plan_fork(config, name, data)
    begin_fork(fork, data, lambda text: None)
    (checkpoint,) = list_checkpoints(fork.config.run_dir / "checkpoints")
    return checkpoint


def test_weights_and_moments_are_the_parents_bits_and_its_memory_is_left_behind(
    parent: Path, shards: Shards
) -> None:
    checkpoint = begun(validate(settings(parent, shards, seed=7)), "bits")
    manifest = verify(checkpoint)
    assert (manifest.step, manifest.position, manifest.updates) == (0, 0, STEPS)
    assert manifest.config["seed"] == 7
    theirs = tensors_of(parent, STEPS)
    for file, tensors in tensors_of(checkpoint.parent.parent, 0).items():
        kept = {name for name in theirs[file] if name.startswith(("master/", "exp_avg"))}
        assert tensors.keys() == kept and kept < theirs[file].keys()
        assert all(torch.equal(tensors[name], theirs[file][name]) for name in kept)
    remove(checkpoint.parent.parent)


@pytest.mark.parametrize(
    ("changes", "same_data", "kept"),
    [
        ({}, True, "everything"),
        ({"train__lr": 0.5, "parallel__zero": 3, "checkpoint__every": 9}, True, "everything"),
        ({}, False, "weights and moments"),
        ({"seed": 3}, True, "weights and moments"),
        ({"train__batch_size": 8}, True, "weights and moments"),
        ({"data__segment_len": 32}, True, "weights and moments"),
        ({"model__num_layers": 3}, True, "weights"),
        ({"model__memory": "none", "seed": 3}, False, "weights"),
    ],
)
def test_what_is_kept_follows_from_what_is_changed(
    changes: dict[str, object], same_data: bool, kept: str, parent: Path, shards: Shards
) -> None:
    manifest = read_manifest(list_checkpoints(parent / "checkpoints")[-1])
    found = find_changes(validate(settings(parent, shards, **changes)), manifest)
    assert what_is_kept(found, same_data) == kept


def test_another_memory_takes_the_weights_by_name(parent: Path, shards: Shards) -> None:
    config = validate(settings(parent, shards, model__memory={"name": "window"}, train__steps=4))
    child, text = start(config, "windowed")
    assert f"begins with weights of {parent}/checkpoints/step-00000006" in text
    assert f"weights from {parent}/checkpoints/step-00000006 (step 6)" in text
    assert [row["step"] for row in read_rows(child)] == [1, 2, 3, 4]
    manifest = manifest_of(child, 4)
    assert (manifest["updates"], manifest["parent"]["keeps"]) == (4, "weights")
    assert manifest["config"]["model"]["init_from"] == str(parent / "checkpoints/step-00000006")
    _, again = start(config, "windowed")
    assert "resumed at step 4" in again
    remove(child)


def test_a_model_whose_weights_do_not_fit_leaves_no_folder(parent: Path, shards: Shards) -> None:
    config = validate(settings(parent, shards, model__num_layers=3))
    with pytest.raises(ConfigError, match="model.num_layers: 3, but "):
        open_run(config, fork="deeper")
    assert not parent.with_name("deeper").exists()


# started again, and refused


def test_the_same_command_goes_on_with_the_fork(parent: Path, shards: Shards) -> None:
    config = validate(settings(parent, shards, seed=3, train__steps=4))
    child, _ = start(config, "again")
    _, text = start(validate(settings(parent, shards, seed=3, train__steps=6)), "again")
    assert "begins with" not in text and "resumed at step 4" in text
    assert [row["step"] for row in read_rows(child)] == [1, 2, 3, 4, 5, 6]
    remove(child)


def test_a_jobs_notes_do_not_take_the_forks_name(parent: Path, shards: Shards) -> None:
    folder = parent.with_name("in_a_job")
    assert begin_attempt(folder, job="7", nodes=["a"], lost=[]) == 1
    (folder / ".preflight-a-12").touch()  # its writer was killed
    checkpoint = begun(validate(settings(parent, shards, seed=3)), folder.name)
    verify(checkpoint)
    told = {"code": 0, "stopped_by": "USR1", "cancelled": False, "preflight": None}
    assert end_attempt(folder, job="7", **told).action == "requeue"
    remove(folder)


def test_a_fork_that_was_cut_short_is_made_again(parent: Path, shards: Shards) -> None:
    config = validate(settings(parent, shards, seed=3))
    checkpoint = begun(config, "short")
    checkpoint.rename(checkpoint.with_suffix(".tmp"))  # as if killed before the rename
    assert begun(config, "short") == checkpoint
    verify(checkpoint)
    remove(checkpoint.parent.parent)


def test_a_damaged_newest_checkpoint_is_passed_over(
    parent: Path, shards: Shards, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(parent, damaged)
    named = flip_bit(damaged / "checkpoints/step-00000006", random.Random(0))
    fork = plan_fork(validate(settings(damaged, shards, seed=3)), "child", OTHER)
    said: list[str] = []
    begin_fork(fork, OTHER, said.append)
    assert named in said[0]
    assert "step-00000004" in said[1]


def refuse(config: Config, name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_fork(config, name, OTHER)
    return str(caught.value)


def make_stranger(parent: Path) -> str:
    stranger = parent.with_name("stranger")
    stranger.mkdir(exist_ok=True)
    (stranger / "config.yaml").touch()
    return "stranger"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (lambda parent: parent.name, "this run itself has the name"),
        (make_stranger, "is another run's folder already; give another name"),
        (lambda parent: "a/b", "name: "),
    ],
)
def test_a_name_that_will_not_do(
    name: Callable[[Path], str], text: str, parent: Path, shards: Shards
) -> None:
    assert text in refuse(validate(settings(parent, shards)), name(parent))


def test_nothing_to_fork(tmp_path: Path, shards: Shards) -> None:
    text = refuse(validate(settings(tmp_path / "absent", shards)), "child")
    assert f"{tmp_path / 'absent'} has no checkpoint to begin from" in text


def test_the_command_line_refuses_a_change_and_names_the_remedy(
    parent: Path, shards: Shards, tmp_path: Path
) -> None:
    done = longhaul("pretrain", write(tmp_path, settings(parent, shards, seed=5)))
    assert done.returncode == 2
    assert "seed: 5, but run" in done.stderr and "--fork NAME" in done.stderr
    both = longhaul("pretrain", write(tmp_path, settings(parent, shards)), "--fork", "x", "--fresh")
    assert both.returncode == 2
    assert "--fresh and --fork x exclude each other" in both.stderr


def test_files_are_shared_where_the_file_system_can(parent: Path, shards: Shards) -> None:
    fingerprint = read_manifest(list_checkpoints(parent / "checkpoints")[-1]).data
    checkpoint = begun(validate(settings(parent, shards, train__steps=8)), "shared", fingerprint)
    for name in verify(checkpoint).files:
        assert os.path.samefile(checkpoint / name, parent / "checkpoints/step-00000006" / name)
    remove(checkpoint.parent.parent)


def test_files_are_copied_where_it_cannot(
    parent: Path, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    fingerprint = read_manifest(list_checkpoints(parent / "checkpoints")[-1]).data
    checkpoint = begun(validate(settings(parent, shards, train__steps=8)), "copied", fingerprint)
    for name in verify(checkpoint).files:
        assert not os.path.samefile(checkpoint / name, parent / "checkpoints/step-00000006" / name)
    remove(checkpoint.parent.parent)
