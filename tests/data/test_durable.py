"""Files that are complete or invisible, on disk when a call returns."""

import os
import stat
from pathlib import Path

import pytest

from data.durable import write_atomically


def test_a_failed_rename_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        write_atomically(path, b"new")
    assert {each: each.read_bytes() for each in tmp_path.iterdir()} == {path: b"old"}


def test_a_file_is_durable_before_its_name_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        calls.append(f"rename {source.name} to {target.name}")
        rename(source, target)

    def fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "file", b"content")
    assert calls == ["sync file.tmp", "rename file.tmp to file", f"sync {tmp_path.name}"]


def test_what_a_kill_left_beside_a_file_goes_with_the_next_write(tmp_path: Path) -> None:
    (tmp_path / "file.tmp").write_bytes(b"half of a longer te")
    write_atomically(tmp_path / "file", b"content")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"file": b"content"}


def test_a_rivals_half_written_file_is_left_alone(tmp_path: Path) -> None:
    rival = tmp_path / f"file.{os.getpid() + 1}.tmp"
    rival.write_bytes(b"hal")
    write_atomically(tmp_path / "file", b"content", rivals=True)
    found = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    assert found == {"file": b"content", rival.name: b"hal"}


def test_text_is_utf_8_and_a_mode_may_keep_others_out(tmp_path: Path) -> None:
    write_atomically(tmp_path / "secret", "naïve\n", mode=0o600)
    assert (tmp_path / "secret").read_bytes() == b"na\xc3\xafve\n"
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
