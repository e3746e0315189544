"""A file system that is away for a while is waited for; what is missing or damaged is not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from data import patience
from data.files import OpenFile
from data.patience import patiently


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS_S", (0.0, 0.0))


def fail_first(errors: list[int]) -> str:
    if errors:
        number = errors.pop()
        raise OSError(number, os.strerror(number))
    return "read"


def test_it_waits_while_the_file_system_is_away_and_says_so(
    capfd: pytest.CaptureFixture[str],
) -> None:
    errors = [errno.ENOTCONN] * 2
    assert patiently(lambda: fail_first(errors), "shard 3") == "read"
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2 and told[0].startswith("shard 3: [Errno 107]")


def test_it_waits_no_longer_than_it_says() -> None:
    errors = [errno.ESTALE] * 3
    with pytest.raises(OSError, match="Stale"):
        patiently(lambda: fail_first(errors), "shard 3")
    assert not errors


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC])
def test_what_no_wait_mends_is_raised_at_once(number: int) -> None:
    errors = [number] * 2
    with pytest.raises(OSError, match="Errno"):
        patiently(lambda: fail_first(errors), "shard 3")
    assert len(errors) == 1


def test_an_open_file_that_was_lost_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(b"0123456789")
    file = OpenFile(path)
    path.rename(tmp_path / "old")
    path.write_bytes(b"abcdefghij")
    lost, pread = [1], os.pread

    def once(descriptor: int, count: int, offset: int) -> bytes:
        if lost:
            lost.pop()
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return pread(descriptor, count, offset)

    assert file.read(3, 2) == b"234"
    monkeypatch.setattr(os, "pread", once)
    assert file.read(3, 2) == b"cde"
    assert file.size() == 10
