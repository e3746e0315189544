"""Checkpoints are complete or invisible, what damages one is found and named, none is pickled."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from tests.ranks import run_ranks
from tests.train.attempts import forked
from tests.train.tiny import Shards, build_tiny, tiny
from train import checkpoint
from train.checkpoint import (
    BadCheckpoint,
    Manifest,
    MasterWeights,
    choose_checkpoint,
    find_newest_good,
    list_checkpoints,
    read_manifest,
    remove_unfinished,
    retain,
    save,
    set_aside_after,
    verify,
)
from train.config import Config, validate
from train.loop import TrainState
from train.resume import RunFolder
from train.snapshot import read_model

pytestmark = pytest.mark.gloo


def describe(step: int) -> Callable[[dict[str, dict[str, Any]]], Manifest]:
    def make(files: dict[str, dict[str, Any]]) -> Manifest:
        return Manifest(
            step=step,
            position=4 * step,
            updates=step,
            nonfinite=0,
            layout={"tp": 1, "cp": 1, "dp": 2, "zero": 1},
            config={"train": {"lr": 0.1}},
            data="fingerprint",
            vocab_size=257,
            parameters={},
            versions={},
            files=files,
        )

    return make


def save_step(folder: Path, step: int) -> Path:
    """Save tensors that tell their rank and step."""
    value = 100.0 * step + dist.get_rank()
    return save(folder, {"a/b": torch.full((64,), value)}, describe(step), step=step)


def save_steps(folder: Path, *steps: int) -> None:
    for step in steps:
        save_step(folder, step)


def saved(folder: Path, *steps: int, ranks: int = 2) -> list[Path]:
    """Return the paths of checkpoints saved by so many ranks."""
    run_ranks(ranks, save_steps, folder, *steps)
    return [folder / f"step-{step:08d}" for step in steps]


def find(folder: Path) -> tuple[str | None, list[str]]:
    """Return the name of the newest good checkpoint, and what was said."""
    said: list[str] = []
    found = find_newest_good(folder, said.append)
    return (found[0].name if found else None), said


# saving


def test_a_saved_checkpoint_holds_every_ranks_tensors(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 7)
    manifest = verify(path)
    assert (manifest.step, manifest.position, manifest.updates) == (7, 28, 7)
    assert sorted(manifest.files) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    for rank in range(2):
        tensors = checkpoint.load_tensors(path, rank)
        assert torch.equal(tensors["a/b"], torch.full((64,), 700.0 + rank))


def test_the_pointer_names_the_newest(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    assert (tmp_path / "latest").read_text() == "step-00000002"
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000002"]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    for file in path.glob("*.safetensors"):
        load_file(file)  # knows no pickle
    json.loads((path / "manifest.json").read_text())


def save_twice(folder: Path) -> float:
    save_step(folder, 1)
    path = save(folder, {"a/b": torch.full((64,), 5.0)}, describe(1), step=1)
    return checkpoint.load_tensors(path, dist.get_rank())["a/b"][0].item()


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    assert run_ranks(2, save_twice, tmp_path) == [5.0, 5.0]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


# killed while saving


@contextmanager
def dying(name: str, call: int) -> Iterator[None]:
    """End this process by SIGKILL inside call number `call` of a function of train.checkpoint."""
    original, calls = getattr(checkpoint, name), [0]

    def die(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            if name == "save_file":  # in the middle of the write
                Path(args[1]).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(checkpoint, name, die)
    yield
    setattr(checkpoint, name, original)


def save_then_die(folder: Path, name: str, call: int, rank: int) -> None:
    save_step(folder, 1)
    if dist.get_rank() == rank:
        with dying(name, call):
            save_step(folder, 2)
    save_step(folder, 2)  # fails: a peer is gone


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_inside_a_save_leaves_no_checkpoint(rank: int, tmp_path: Path) -> None:
    with forked(2, tmp_path, save_then_die, tmp_path, "save_file", 1, rank) as attempt:
        codes = attempt.wait()
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1  # it does not wait for ever, nor go on alone
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert run_ranks(2, find, tmp_path) == [("step-00000001", [])] * 2
    assert remove_unfinished(tmp_path) == ["step-00000002.tmp"]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


@pytest.mark.parametrize("call", range(1, 6))
def test_wherever_a_save_is_killed_checkpoints_are_complete_or_invisible(
    call: int, tmp_path: Path
) -> None:
    # calls of _sync: the share, the manifest, the folder, the pointer, the parent folder
    with forked(1, tmp_path, save_then_die, tmp_path, "_sync", call, 0) as attempt:
        assert attempt.wait() == [-signal.SIGKILL]
    steps = [verify(path).step for path in list_checkpoints(tmp_path)]
    assert steps == ([1] if call <= 3 else [1, 2])
    remove_unfinished(tmp_path)
    saved(tmp_path, 2, ranks=1)  # the next attempt can
    assert [verify(path).step for path in list_checkpoints(tmp_path)] == [1, 2]


def save_on_a_full_disk(folder: Path, full_rank: int) -> str:
    if dist.get_rank() == full_rank:
        # a real failure of write(2), as a full disk gives
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        save_step(folder, 3)
    except OSError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_disk_full_on_one_rank_is_raised_on_all(full_rank: int, tmp_path: Path) -> None:
    first, second = run_ranks(2, save_on_a_full_disk, tmp_path, full_rank)
    assert first == second
    assert first.startswith(f"checkpoint not saved: rank {full_rank}: ")
    assert "File too large" in first
    assert list_checkpoints(tmp_path) == []


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
    return "step-00000020: format 99, this longhaul reads format 1"


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
    assert said[1:] == ["resuming from step 10: 10 steps are lost"]


@pytest.mark.parametrize("fault", FAULTS)
def test_one_process_finds_the_same_faults(
    fault: Callable[[Path], str], two_checkpoints: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints/step-00000020"
    text = fault(newest)
    with pytest.raises(BadCheckpoint) as caught:
        verify(newest)
    assert text in str(caught.value)
    assert choose_checkpoint(tmp_path)[0].name == "step-00000010"


def test_a_damaged_checkpoint_asked_for_by_name_is_refused(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    path = tmp_path / "step-00000020"
    shutil.copytree(two_checkpoints / path.name, path)
    flip_bit(path)
    with pytest.raises(ValueError, match="was damaged; choose another checkpoint"):
        choose_checkpoint(path)


def test_a_good_checkpoint_is_taken_without_a_word(two_checkpoints: Path) -> None:
    assert run_ranks(2, find, two_checkpoints) == [("step-00000020", [])] * 2


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


def test_retention_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    kept = {}
    for step in range(10, 70, 10):
        empty_checkpoints(tmp_path, step)
        retain(tmp_path, keep=2, keep_every=30)
        kept[step] = names(tmp_path)
    assert kept == {
        10: [10],
        20: [10, 20],
        30: [20, 30],
        40: [30, 40],
        50: [30, 40, 50],
        60: [30, 50, 60],
    }


def test_retention_without_multiples_keeps_the_newest_only(tmp_path: Path) -> None:
    empty_checkpoints(tmp_path, 1, 2, 3, 4)
    deleted = retain(tmp_path, keep=2, keep_every=None)
    assert [path.name for path in deleted] == ["step-00000001", "step-00000002"]
    assert names(tmp_path) == [3, 4]


def test_damaged_newer_checkpoints_do_not_count_as_newest(tmp_path: Path) -> None:
    # going on from 10 while 20 and 30 are damaged, the first save is at 15
    empty_checkpoints(tmp_path, 10, 20, 30)
    aside = set_aside_after(tmp_path, 10)
    assert [path.name for path in aside] == ["step-00000020.bad", "step-00000030.bad"]
    empty_checkpoints(tmp_path, 15)
    retain(tmp_path, keep=2, keep_every=None)
    assert names(tmp_path) == [10, 15]
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
    RunFolder(config, built, mesh, inputs.train.fingerprint).save(TrainState())


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
    weights = MasterWeights(path, manifest)
    missing = 0
    for name in manifest.parameters:
        try:
            weights[name]
        except BadCheckpoint as error:
            missing += 1
            assert name in str(error)
    assert missing > 0
