"""A folder of fetched files with a size limit, shared by every process of a node.

    CACHE/<sha256>              a complete file, named by its content
    CACHE/<sha256>.<bytes>.part one that is being fetched, or was when its process died
    CACHE/lock                  held for the moment in which space is shared out

Whoever fetches holds a lock on the .part file, so that others wait instead of fetching it too; the
operating system gives it back when a process dies, and the next one goes on from what is there. A
file gets its name once its size and sha256 are right. Use a disk of the node: locks of network
file systems differ. Nothing is fsync'd: what a power cut leaves is found by the crc32 of documents,
and fetched anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from data.files import OpenFile

_PART = ".part"
# What may be deleted to make room: a cache_dir that holds other files as well loses none of them.
_OURS = re.compile(r"[0-9a-f]{64}(?:\.(\d+)\.part)?")
# A use is noted this often: enough for what was used last, and cheap.
_TOUCH_S = 10.0
_WAIT_S = 0.05


class WrongBytes(OSError):
    """What came is not what the manifest lists."""


class _Part(NamedTuple):
    """A file that is being fetched, locked by who fetches it."""

    descriptor: int
    path: Path


@dataclass
class Traffic:
    """What a process fetched since it began."""

    files: int = 0
    bytes: int = 0
    retries: int = 0
    evicted: int = 0
    waited_s: float = 0.0  # of all threads, for files to come


class Cache:
    """Files by their sha256; safe to use from several threads and processes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Make the folder, where there is none; ValueError where that fails."""
        self.folder, self.limit_bytes = folder, limit_bytes
        self._lock = threading.Lock()
        self._traffic = Traffic()
        self._touched: dict[str, float] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._sharing_out():
                pass
        except OSError as error:
            raise ValueError(
                f"data.cache_dir={folder} cannot be written ({error.strerror}); name a folder on a"
                " disk of this node"
            ) from error

    def traffic(self) -> dict[str, float]:
        """Return what this process fetched: files, bytes, retries, evicted, waited_s."""
        with self._lock:
            return asdict(self._traffic)

    def count(self, **more: float) -> None:
        """Add to the traffic."""
        with self._lock:
            for name, value in more.items():
                setattr(self._traffic, name, getattr(self._traffic, name) + value)

    def open(
        self, sha256: str, size: int, fill: Callable[[int], None], *, exact: bool = True
    ) -> OpenFile:
        """Return a file, fetched by `fill` where it is not here.

        size: its bytes, or not exact, about so many. fill writes to a descriptor whose first
        bytes, if it has any, an interrupted fetch left; what it raises is raised here. Raises
        WrongBytes where it brought others, and ValueError where the limit is below the size.
        """
        if size > self.limit_bytes:
            raise ValueError(
                f"data.cache_bytes={self.limit_bytes} is less than a file of {size} bytes; use at"
                f" least {2 * size}, so that one can be read while the next comes"
            )
        began = None
        while (found := self._find(sha256, size if exact else None)) is None:
            began = began or time.monotonic()
            part = self._begin(sha256, size)
            if part is None:
                continue
            try:
                found = self._finish(part, sha256, size if exact else None, fill)
            finally:
                os.close(part.descriptor)
            break
        if began is not None:
            self.count(waited_s=time.monotonic() - began)
        return found

    def discard(self, sha256: str) -> None:
        """Forget a file; who has it open may go on."""
        (self.folder / sha256).unlink(missing_ok=True)

    def _find(self, sha256: str, size: int | None) -> OpenFile | None:
        path = self.folder / sha256
        try:
            found = OpenFile(path)
        except FileNotFoundError:
            return None
        if size is not None and found.size() != size:
            self.discard(sha256)  # somebody cut it
            return None
        now = time.monotonic()
        if now - self._touched.get(sha256, -_TOUCH_S) >= _TOUCH_S:
            self._touched[sha256] = now
            try:
                os.utime(path)
            except FileNotFoundError:
                pass  # evicted this moment; `found` stays readable
        return found

    def _begin(self, sha256: str, size: int) -> _Part | None:
        """Return a locked .part file with its space kept; None after a wait: look again."""
        path = self.folder / f"{sha256}.{size}{_PART}"
        with self._sharing_out():
            part = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            mine = _lock_now(part)
            if mine and not (self.folder / sha256).exists() and self._make_room(path, size):
                return _Part(part, path)
            if mine and not os.fstat(part).st_size:
                path.unlink()
        if mine:
            time.sleep(_WAIT_S)  # came meanwhile, or others' fetches fill the cache
        else:
            fcntl.flock(part, fcntl.LOCK_EX)  # until who fetches it is done, or dead
        os.close(part)
        return None

    def _finish(
        self, part: _Part, sha256: str, size: int | None, fill: Callable[[int], None]
    ) -> OpenFile:
        before = os.fstat(part.descriptor).st_size
        try:
            fill(part.descriptor)
            _check(part.descriptor, sha256, size)
        except WrongBytes:
            os.ftruncate(part.descriptor, 0)
            raise
        finally:
            now = os.fstat(part.descriptor).st_size
            self.count(bytes=max(0, now - before))
        opened = OpenFile(part.path)
        with self._sharing_out():
            part.path.rename(self.folder / sha256)
        self.count(files=1)
        return opened

    def _make_room(self, mine: Path, size: int) -> bool:
        """Evict what was used longest ago; return whether `size` bytes fit then."""
        taken, spare = 0, []
        for entry in os.scandir(self.folder):
            match = _OURS.fullmatch(entry.name)
            if match is None or entry.path == str(mine):
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue  # discarded this moment
            held = max(status.st_size, int(match[1] or 0))  # a part's space is kept for it
            taken += held
            spare.append((status.st_mtime_ns, entry.path, held))
        for _, path, held in sorted(spare):
            if taken + size <= self.limit_bytes:
                break
            if _remove(path):
                taken -= held
                self.count(evicted=1)
        return taken + size <= self.limit_bytes

    @contextmanager
    def _sharing_out(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _lock_now(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(path: str) -> bool:
    """Delete a file, but none that is being fetched; return whether it is gone."""
    if path.endswith(_PART):
        descriptor = os.open(path, os.O_RDWR)
        try:
            if not _lock_now(descriptor):
                return False
            os.unlink(path)
        finally:
            os.close(descriptor)
    else:
        Path(path).unlink(missing_ok=True)
    return True


def _check(descriptor: int, sha256: str, size: int | None) -> None:
    found = os.fstat(descriptor).st_size
    if size is not None and found != size:
        raise WrongBytes(f"{found} bytes came, the manifest says {size}")
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise WrongBytes(f"what came has sha256 {digest[:12]}, the manifest says {sha256[:12]}")
