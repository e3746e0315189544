"""What damages a checkpoint is found and named, the newest good one is taken; what is kept."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.train.saves import saved
from tests.train.tiny import Shards, build_tiny, tiny
from train.checkpoints.folder import (
    BadCheckpoint,
    choose_checkpoint,
    find_newest_good,
    list_checkpoints,
    read_manifest,
    remove_unfinished,
    set_aside_after,
    verify,
)
from train.checkpoints.snapshot import read_model
from train.checkpoints.stored import Stored
from train.loop import TrainState
from train.settings.config import Config, validate
from train.starting.resume import RunFolder

pytestmark = pytest.mark.gloo


def find(folder: Path) -> tuple[str | None, list[str]]:
    """Return the name of the newest good checkpoint, and what was said."""
    said: list[str] = []
    # but for the rate, which is a rank's own
    found = find_newest_good(folder, lambda text: said.append(text.split(": 0.")[0]))
    return (found[0].name if found else None), said


# damage


def flip_bit(path: Path) -> str:
    file = path / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    return "rank-00001.safetensors: its sha256 is not the manifest's; the file was damaged"


def truncate(path: Path) -> str:
    file = path / "rank-00000.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 10)
    return f"rank-00000.safetensors: {size - 10} bytes, {size} were written"


def remove(path: Path) -> str:
    (path / "rank-00001.safetensors").unlink()
    return "rank-00001.safetensors: missing"


def swap(path: Path) -> str:
    one, other = (path / f"rank-0000{rank}.safetensors" for rank in range(2))
    one.rename(path / "aside")
    other.rename(one)
    (path / "aside").rename(other)
    return "rank-00000.safetensors: its sha256 is not the manifest's"


def take_from_another_step(path: Path) -> str:
    name = "rank-00001.safetensors"
    shutil.copy(path.parent / "step-00000010" / name, path / name)
    return f"{name}: its sha256 is not the manifest's"


def lose_manifest(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "step-00000020: no readable manifest.json"


def cut_manifest(path: Path) -> str:
    file = path / "manifest.json"
    file.write_text(file.read_text()[:-20])
    return "step-00000020: no readable manifest.json"


def binary_manifest(path: Path) -> str:
    (path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    return "step-00000020: no readable manifest.json"


def other_json(path: Path) -> str:
    (path / "manifest.json").write_text("[1, 2]")
    return "step-00000020: no readable manifest.json"


def change_manifest(path: Path) -> str:
    file = path / "manifest.json"
    text = file.read_text()
    assert '"step": 20' in text
    file.write_text(text.replace('"step": 20', '"step": 60'))  # one bit
    return "manifest.json: its content is not what was written"


def other_format(path: Path) -> str:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    return "step-00000020: format 99, this longhaul reads format 2"


FAULTS = [
    flip_bit,
    truncate,
    remove,
    swap,
    take_from_another_step,
    lose_manifest,
    cut_manifest,
    binary_manifest,
    other_json,
    change_manifest,
    other_format,
]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    saved(folder, 10, 20)
    return folder


def find_all(folders: list[Path]) -> list[tuple[str | None, list[str]]]:
    return [find(folder) for folder in folders]


@pytest.fixture(scope="module")
def found(
    two_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, Any]]:
    """For every fault: the text that must name it, and what both ranks made of it."""
    folders, texts = [], []
    for fault in FAULTS:
        folder = tmp_path_factory.mktemp(fault.__name__)
        shutil.copytree(two_checkpoints, folder, dirs_exist_ok=True)
        texts.append(fault(folder / "step-00000020"))
        folders.append(folder)
    ranks = run_ranks(2, find_all, folders)
    results = zip(texts, zip(*ranks, strict=True), strict=True)
    return dict(zip((fault.__name__ for fault in FAULTS), results, strict=True))


@pytest.mark.parametrize("fault", [fault.__name__ for fault in FAULTS])
def test_a_fault_is_named_and_the_checkpoint_before_taken(
    fault: str, found: dict[str, tuple[str, Any]]
) -> None:
    text, (first, second) = found[fault]
    assert first == second
    name, said = first
    assert name == "step-00000010"
    assert said[0].startswith("checkpoint not used: ") and text in said[0]
    assert said[1].startswith("verified ") and "step-00000010" in said[1]
    assert said[2:] == ["resuming from step 10: 10 steps are lost"]


@pytest.mark.parametrize("fault", FAULTS)
def test_one_process_finds_the_same_faults(
    fault: Callable[[Path], str],
    two_checkpoints: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints/step-00000020"
    text = fault(newest)
    with pytest.raises(BadCheckpoint) as caught:
        verify(newest)
    assert text in str(caught.value)
    assert choose_checkpoint(tmp_path)[0].name == "step-00000010"
    told = capsys.readouterr().err
    assert text in told and "step-00000010 is taken, which is older" in told


def test_a_damaged_checkpoint_asked_for_by_name_is_refused(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    path = tmp_path / "step-00000020"
    shutil.copytree(two_checkpoints / path.name, path)
    flip_bit(path)
    with pytest.raises(ValueError, match="was damaged; choose another checkpoint"):
        choose_checkpoint(path)


def test_a_good_checkpoint_is_taken(two_checkpoints: Path) -> None:
    for name, said in run_ranks(2, find, two_checkpoints):
        assert name == "step-00000020"
        assert len(said) == 1 and said[0].startswith("verified ")


def test_no_checkpoint_is_a_beginning(tmp_path: Path) -> None:
    assert run_ranks(1, find, tmp_path / "checkpoints") == [(None, [])]


def find_none(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        find(folder)
    return str(caught.value)


def test_only_damaged_checkpoints_are_no_beginning(two_checkpoints: Path, tmp_path: Path) -> None:
    # training from step 0 again, unasked, would cost the run
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for path in list_checkpoints(tmp_path):
        remove(path)
    first, second = run_ranks(2, find_none, tmp_path)
    assert first == second
    assert "none of the 2 checkpoints" in first and "--fresh" in first


# retention


def empty_checkpoints(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"step-{step:08d}").mkdir()


def names(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder)]


def test_damaged_newer_checkpoints_do_not_count_as_newest(tmp_path: Path) -> None:
    # going on from 10 while 20 and 30 are damaged, the first save is at 15
    empty_checkpoints(tmp_path, 10, 20, 30)
    aside = set_aside_after(tmp_path, 10)
    assert [path.name for path in aside] == ["step-00000020.bad", "step-00000030.bad"]
    empty_checkpoints(tmp_path, 15)
    assert names(tmp_path) == [10, 15]  # all that retention sees
    assert remove_unfinished(tmp_path) == []  # what was set aside stays


# whole weights


LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one": (1, {}),
    "tp2-cp2-zero1": (4, {"parallel__tp": 2, "parallel__cp": 2}),
    "tp2-cp2-zero3": (4, {"parallel__tp": 2, "parallel__cp": 2, "parallel__zero": 3}),
    "dp2-zero2": (2, {"parallel__zero": 2}),
    "dp2-zero1-bf16": (2, {"parallel__zero": 1, "train__precision": "bf16"}),
    "dp2-zero3-bf16": (2, {"parallel__zero": 3, "train__precision": "bf16"}),
}


def save_at_the_beginning(config: Config) -> None:
    built, mesh, inputs = build_tiny(config)
    RunFolder(config, built, mesh, inputs.train).save_now(TrainState())


def weights_at_the_beginning(name: str, folder: Path, shards: Shards) -> dict[str, Tensor]:
    ranks, changes = LAYOUTS[name]
    config = validate(tiny(folder, shards, **changes))
    run_ranks(ranks, save_at_the_beginning, config)
    model, loaded = read_model(folder)
    assert loaded == config
    return dict(model.named_parameters())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, shards: Shards) -> dict[str, Tensor]:
    return weights_at_the_beginning("one", tmp_path_factory.mktemp("one"), shards)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_shares_of_any_layout_join_to_the_same_whole_weights(
    name: str, expected: dict[str, Tensor], tmp_path: Path, shards: Shards
) -> None:
    # initial weights are a function of seed and name alone, so equality is exact
    joined = weights_at_the_beginning(name, tmp_path, shards)
    assert joined.keys() == expected.keys()
    if name.endswith("bf16"):  # DeepSpeed makes the masters from the rounded weights
        expected = {key: weight.bfloat16().float() for key, weight in expected.items()}
    assert [key for key in expected if not torch.equal(joined[key], expected[key])] == []


def test_a_missing_share_is_found_when_joining(tmp_path: Path, shards: Shards) -> None:
    config = validate(tiny(tmp_path, shards))
    run_ranks(2, save_at_the_beginning, config)
    (path,) = list_checkpoints(tmp_path / "checkpoints")
    manifest = read_manifest(path)
    alone = {name: entry for name, entry in manifest.files.items() if "00000" in name}
    manifest.files.clear()
    manifest.files.update(alone)
    stored = Stored(path, manifest)
    missing = 0
    for name in manifest.parameters:
        try:
            stored.whole(name)
        except BadCheckpoint as error:
            missing += 1
            assert name in str(error)
    assert missing > 0
