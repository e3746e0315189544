"""A save is complete or invisible, beside training, and tells everyone how it ended."""

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.train.attempts import forked
from tests.train.saves import manifest_of, open_saver, save_step, saved
from train.checkpoints import saver
from train.checkpoints.folder import find_newest_good, list_checkpoints, remove_unfinished, verify

pytestmark = pytest.mark.gloo


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try a failing disk again at once, and once only; forked ranks inherit this."""
    monkeypatch.setattr(saver, "RETRY_AFTER_S", (0.01,))


def test_a_saved_checkpoint_holds_every_ranks_tensors(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 7)
    manifest = verify(path)
    assert (manifest.step, manifest.position, manifest.updates) == (7, 28, 7)
    assert sorted(manifest.files) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    for rank, file in enumerate(sorted(manifest.files)):
        assert torch.equal(load_file(path / file)["a/b@0"], torch.full((64,), 700.0 + rank))


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


def save_twice(folder: Path) -> None:
    save_step(folder, 1)
    writer = open_saver(folder)
    writer.start({"a/b@0": torch.full((64,), 5.0)}, manifest_of(1))
    writer.finish()


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    run_ranks(2, save_twice, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]
    written = load_file(tmp_path / "step-00000001/rank-00001.safetensors")
    assert written["a/b@0"].tolist() == [5.0] * 64


# beside training


@contextmanager
def held_writes() -> Iterator[threading.Event]:
    """Let no write begin until the event is set."""
    go, write = threading.Event(), saver.write_tensors

    def wait(*args: Any, **kwargs: Any) -> str:
        go.wait(30)
        return write(*args, **kwargs)

    saver.write_tensors = wait
    yield go
    saver.write_tensors = write


def train_on_while_saving(folder: Path) -> list[Any]:
    weights = torch.ones(64)
    writer = open_saver(folder)
    with held_writes() as go:
        writer.start({"a/b@0": weights}, manifest_of(1))
        weights.fill_(2.0)  # the next step
        seen: list[Any] = [writer.news(), len(list_checkpoints(folder))]
        go.set()
        result = writer.finish()
    assert result is not None
    news = writer.news()
    assert news is not None and writer.news() is None  # told once
    return [*seen, result.error, news.step]


def test_what_is_saved_is_what_was_copied(tmp_path: Path) -> None:
    assert run_ranks(2, train_on_while_saving, tmp_path) == [[None, 0, None, 1]] * 2
    written = load_file(tmp_path / "step-00000001/rank-00000.safetensors")
    assert written["a/b@0"].tolist() == [1.0] * 64


def save_two_at_once(folder: Path) -> list[int]:
    writer = open_saver(folder)
    with held_writes() as go:
        writer.start({"a/b@0": torch.ones(8)}, manifest_of(1))
        threading.Timer(0.3, go.set).start()
        began = time.monotonic()
        writer.start({"a/b@0": torch.ones(8)}, manifest_of(2))  # waits for the first
        assert time.monotonic() - began > 0.2
        there = [verify(path).step for path in list_checkpoints(folder)]
        writer.finish()
    told = [news.step for news in (writer.news(), writer.news()) if news is not None]
    return there + told


def test_two_saves_never_overlap_and_both_are_told(tmp_path: Path) -> None:
    assert run_ranks(1, save_two_at_once, tmp_path) == [[1, 1, 2]]
    assert [verify(path).step for path in list_checkpoints(tmp_path)] == [1, 2]


def save_and_fail_to_tidy(folder: Path) -> str | None:
    def refuse() -> None:
        raise OSError("no such folder any more")

    writer = open_saver(folder)
    writer.committed = refuse
    writer.start({"a/b@0": torch.ones(8)}, manifest_of(1))
    result = writer.finish()
    assert result is not None
    return result.error


def test_what_is_committed_is_saved_on_every_rank_whatever_follows(tmp_path: Path) -> None:
    assert run_ranks(2, save_and_fail_to_tidy, tmp_path) == [None, None]
    assert [verify(path).step for path in list_checkpoints(tmp_path)] == [1]


def growth_while_saving(folder: Path) -> tuple[int, int]:
    """Return the bytes of a share, and by how much this process grew while it was saved twice."""
    share = {f"a/{i}@0": torch.randn(1 << 21) for i in range(16)}
    writer = open_saver(folder)
    before = psutil.Process().memory_info().rss
    for step in (1, 2):
        writer.start(share, manifest_of(step))
        writer.finish()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return sum(tensor.nbytes for tensor in share.values()), peak - before


def test_a_save_takes_no_more_than_one_more_share(tmp_path: Path) -> None:
    ((share, growth),) = run_ranks(1, growth_while_saving, tmp_path)
    assert growth < 1.25 * share  # the copy, and what a chunk's write needs


# killed while saving


@contextmanager
def dying(module: Any, name: str, call: int) -> Iterator[None]:
    """End this process by SIGKILL inside call number `call` of a module's function."""
    original, calls = getattr(module, name), [0]

    def die(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            if name == "write_tensors":  # in the middle of the write
                args[0].write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, die)
    yield
    setattr(module, name, original)


def save_then_die(folder: Path, module: Any, name: str, call: int, rank: int) -> None:
    save_step(folder, 1)
    if dist.get_rank() == rank:
        with dying(module, name, call):
            save_step(folder, 2)
    save_step(folder, 2)  # fails: a peer is gone


def find(folder: Path) -> str | None:
    found = find_newest_good(folder, lambda text: None)
    return found[0].name if found else None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_inside_a_save_leaves_no_checkpoint(rank: int, tmp_path: Path) -> None:
    death = (save_then_die, tmp_path, saver, "write_tensors", 1, rank)
    with forked(2, tmp_path, *death) as attempt:
        codes = attempt.wait()
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1  # it does not wait for ever, nor go on alone
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert run_ranks(2, find, tmp_path) == ["step-00000001"] * 2
    assert remove_unfinished(tmp_path) == ["step-00000002.tmp"]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


@pytest.mark.parametrize("call", range(1, 6))
def test_wherever_a_save_is_killed_checkpoints_are_complete_or_invisible(
    call: int, tmp_path: Path
) -> None:
    # calls of fsync: the share, the manifest, the folder, the pointer, the parent folder
    with forked(1, tmp_path, save_then_die, tmp_path, os, "fsync", call, 0) as attempt:
        assert attempt.wait() == [-signal.SIGKILL]
    steps = [verify(path).step for path in list_checkpoints(tmp_path)]
    assert steps == ([1] if call <= 3 else [1, 2])
    remove_unfinished(tmp_path)
    saved(tmp_path, 2, ranks=1)  # the next attempt can
    assert [verify(path).step for path in list_checkpoints(tmp_path)] == [1, 2]


# a disk that refuses


def save_on_a_full_disk(folder: Path, full_rank: int) -> str:
    writer = open_saver(folder)
    if dist.get_rank() == full_rank:
        # a real failure of write(2), as a full disk gives
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        writer.start({"a/b@0": torch.ones(64)}, manifest_of(3))
        writer.finish()
    except OSError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_disk_full_on_one_rank_is_raised_on_all(full_rank: int, tmp_path: Path) -> None:
    first, second = run_ranks(2, save_on_a_full_disk, tmp_path, full_rank)
    assert first == second
    assert first.startswith("1 checkpoint in a row could not be saved (checkpoint.max_failures=1)")
    assert f"checkpoint not saved: rank {full_rank}: " in first
    assert "File too large" in first
    assert list_checkpoints(tmp_path) == []


def save_on_a_disk_that_recovers(folder: Path) -> list[str | None]:
    writer, errors = open_saver(folder, max_failures=3), []
    for step in range(1, 6):
        refuses = dist.get_rank() == 1 and step in (1, 3, 4)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if refuses else 1 << 30, 1 << 30))
        writer.start({"a/b@0": torch.ones(64)}, manifest_of(step))
        result = writer.finish()
        assert result is not None
        errors.append(result.error)
    return errors


def test_failures_that_are_not_in_a_row_do_not_stop_the_run(tmp_path: Path) -> None:
    both = run_ranks(2, save_on_a_disk_that_recovers, tmp_path)
    assert both[0] == both[1]
    assert [error is None for error in both[0]] == [False, True, False, False, True]
    assert [verify(path).step for path in list_checkpoints(tmp_path)] == [2, 5]


def save_with_a_stumble(folder: Path) -> list[str]:
    said: list[str] = []
    writer = open_saver(folder)
    writer.say = said.append
    write, calls = saver.write_tensors, [0]

    def stumble(*args: Any, **kwargs: Any) -> str:
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(5, "Input/output error")
        return write(*args, **kwargs)

    saver.write_tensors = stumble
    writer.start({"a/b@0": torch.ones(8)}, manifest_of(1))
    assert writer.finish() is not None
    return said


def test_a_write_that_fails_is_tried_again_and_told(tmp_path: Path) -> None:
    (said,) = run_ranks(1, save_with_a_stumble, tmp_path)
    assert said == ["checkpoint, rank 0: [Errno 5] Input/output error; again in 0 s"]
    assert [verify(path).step for path in list_checkpoints(tmp_path)] == [1]


def save_without_a_ledger(folder: Path) -> str:
    writer = open_saver(folder)

    def sync() -> None:
        if dist.get_rank() == 1:
            raise OSError("the data ledger cannot be written: No space left on device")

    writer.sync = sync
    try:
        writer.start({"a/b@0": torch.ones(64)}, manifest_of(3))
        writer.finish()
    except OSError as error:
        return str(error)
    return "saved"


def test_what_must_be_on_disk_before_is_part_of_the_save(tmp_path: Path) -> None:
    first, second = run_ranks(2, save_without_a_ledger, tmp_path)
    assert first == second and "rank 1: the data ledger cannot be written" in first
    assert list_checkpoints(tmp_path) == []
