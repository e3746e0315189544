"""Which checkpoints stay; whatever happens to the newest, two good ones do."""

from pathlib import Path

import pytest

from tests.train.stored import damage, store
from train.checkpoints import manifest as stored
from train.checkpoints import retention
from train.checkpoints.names import list_checkpoints, step_of
from train.checkpoints.retention import is_good, retain


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


def save_and_retain(folder: Path, step: int, keep: int = 2, keep_every: int | None = None) -> None:
    store(folder, step)
    retain(folder, keep=keep, keep_every=keep_every)


def test_the_newest_and_the_multiples_stay(tmp_path: Path) -> None:
    kept = {}
    for step in range(10, 70, 10):
        save_and_retain(tmp_path, step, keep_every=30)
        kept[step] = steps(tmp_path)
    assert kept == {
        10: [10],
        20: [10, 20],
        30: [20, 30],
        40: [30, 40],
        50: [30, 40, 50],
        60: [30, 50, 60],
    }


def test_without_multiples_the_newest_stay_only(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        store(tmp_path, step)
    deleted = retain(tmp_path, keep=2, keep_every=None)
    assert [path.name for path in deleted] == ["step-00000001", "step-00000002"]
    assert steps(tmp_path) == [3, 4]


def test_multiples_stay_for_ever_even_damaged(tmp_path: Path) -> None:
    damage(store(tmp_path, 100))
    for step in range(110, 400, 10):
        save_and_retain(tmp_path, step, keep_every=100)
    assert steps(tmp_path) == [100, 200, 300, 380, 390]


@pytest.mark.parametrize("broken", [{40}, {30}, {30, 40}, {20, 40}, {20, 30, 40}])
def test_a_damaged_one_does_not_count(broken: set[int], tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        path = store(tmp_path, step)
        if step in broken:
            damage(path)
    said: list[str] = []
    deleted = retain(tmp_path, keep=2, keep_every=None, say=said.append)
    good = [step for step in steps(tmp_path) if step not in broken]
    assert len(good) >= min(2, 4 - len(broken))
    assert broken <= set(steps(tmp_path))  # named and left, not deleted
    assert len(said) == len(broken)
    assert all("sha256 is not the manifest's" in text for text in said)
    assert not broken & {step_of(path) for path in deleted}


def test_with_every_newer_one_damaged_at_any_time_two_good_ones_stay(tmp_path: Path) -> None:
    for step in range(10, 30, 10):
        store(tmp_path, step)
    for step in range(30, 90, 10):
        damage(store(tmp_path, step))
        retain(tmp_path, keep=2, keep_every=None)
    assert steps(tmp_path) == [10, 20, 30, 40, 50, 60, 70, 80]
    for step in (90, 100):
        save_and_retain(tmp_path, step)
    assert [step for step in steps(tmp_path) if step > 80] == [90, 100]
    assert not {10, 20} & set(steps(tmp_path))


@pytest.mark.parametrize("keep", [0, 1])
def test_fewer_than_two_are_never_asked_for(keep: int, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_and_retain(tmp_path, step, keep=keep)
    assert steps(tmp_path) == [20, 30]


def test_each_checkpoint_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = stored.file_hash

    def count(path: Path) -> str:
        read.append(path.parent.name)
        return original(path)

    monkeypatch.setattr(stored, "file_hash", count)
    for step in range(1, 9):
        save_and_retain(tmp_path, step, keep=3)
    assert sorted(read) == sorted(f"step-{step:08d}" for step in range(2, 9) for _ in range(2))


def test_a_file_changed_after_it_was_hashed_is_hashed_again(tmp_path: Path) -> None:
    path = store(tmp_path, 10)
    assert is_good(path)
    damage(path)
    assert not is_good(path)


def test_a_folder_that_cannot_be_written_is_still_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(tmp_path, 10)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(stored, "write_atomically", refuse)
    assert is_good(path)
    assert not (path / stored.VERIFIED).exists()


def test_a_deletion_that_is_cut_short_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(tmp_path, 10)
    monkeypatch.setattr(retention.shutil, "rmtree", lambda *_, **__: None)
    retention.delete(path)
    assert list_checkpoints(tmp_path) == []
    assert [left.suffix for left in tmp_path.iterdir()] == [".tmp"]
