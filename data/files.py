"""Where the files of a corpus lie: a folder here, or (`data.remote`) a URL behind a cache.

A corpus asks for whole small files and for opened shards; it never joins a path itself.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from data.patience import patiently
from data.shards import Manifest, Shard

# Below the usual limit of 1024 open files, with room for the trainer's own.
_OPEN_SHARDS = 128


class OpenFile:
    """A descriptor that closes with its last user, so an evicted one is never pulled away."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, -1
        self._descriptor = patiently(lambda: os.open(path, os.O_RDONLY), path)

    def size(self) -> int:
        """Return the bytes that the file has now."""
        return os.fstat(self._descriptor).st_size

    def read(self, count: int, offset: int) -> bytes:
        """Return `count` bytes from `offset` on; OSError where the file ends before."""
        return patiently(lambda: self._read(count, offset), self._path, self._reopen)

    def _reopen(self) -> None:
        """Open the file anew: what was open when a server was lost may never be read again."""
        fresh = os.open(self._path, os.O_RDONLY)
        try:  # under the same number: other threads may be reading
            os.dup2(fresh, self._descriptor, inheritable=False)
        finally:
            os.close(fresh)

    def _read(self, count: int, offset: int) -> bytes:
        # pread, not a memory map: a map over a file that shrinks is a bus error without a
        # word, and page faults on a slow file system would hold the interpreter's lock.
        pieces = []
        while count > 0:
            piece = os.pread(self._descriptor, count, offset)
            if not piece:
                raise OSError("the file ends early")
            pieces.append(piece)
            count -= len(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class Files(Protocol):
    """The files of one corpus. OSError: a file is missing or cannot be what it should be."""

    @property
    def where(self) -> Path | str:
        """The folder or URL, as the user gave it."""

    def manifest(self) -> Manifest:
        """Return the corpus's manifest; ValueError where there is no good one."""

    def shown(self, name: str) -> str:
        """Return how messages name a file."""

    def read(self, name: str, sha256: str, about: int) -> bytes:
        """Return a whole small file, of about so many bytes; the caller checks the hash."""

    def open(self, shard: Shard) -> OpenFile:
        """Return a shard's file, for reading a little of it."""

    def fault(self, shard: Shard) -> str | None:
        """Return what is wrong with a shard, as far as can be told without reading it."""

    def unlisted(self, manifest: Manifest) -> list[str]:
        """Return the names of shards that lie there, but not in the manifest."""

    def fetch_indices(self, manifest: Manifest) -> None:
        """Bring every index here at once, where each takes a while to come."""

    def discard(self, shard: Shard) -> bool:
        """Forget a damaged copy of a shard, to fetch it anew; False where there is no copy."""


class LocalFiles:
    """A folder: files are read where they lie."""

    def __init__(self, folder: Path) -> None:
        self.where = folder
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(lambda name: OpenFile(folder / name))

    def manifest(self) -> Manifest:
        """Return the corpus's manifest; ValueError where there is no good one."""
        return Manifest.read(self.where)

    def shown(self, name: str) -> str:
        """Return the file's path."""
        return str(self.where / name)

    def read(self, name: str, sha256: str, about: int) -> bytes:
        """Return a whole file."""
        return patiently((self.where / name).read_bytes, self.where / name)

    def open(self, shard: Shard) -> OpenFile:
        """Return a shard's file; the ones used last stay open."""
        return self._open(shard.name)

    def fault(self, shard: Shard) -> str | None:
        """Return what is wrong with a shard's file as far as its size tells, else None."""
        path = self.where / shard.name
        remedy = "restore it, set data.on_damage=skip, or run `longhaul prepare --force`"
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"{path} is missing ({error.strerror}); {remedy}"
        if size != shard.bytes:
            return f"{path} has {size} bytes, the manifest says {shard.bytes}; {remedy}"
        return None

    def unlisted(self, manifest: Manifest) -> list[str]:
        """Return the names of shards that lie there, but not in the manifest."""
        listed = {shard.name for shard in manifest.shards}
        return sorted(path.name for path in self.where.glob("*.tar") if path.name not in listed)

    def fetch_indices(self, manifest: Manifest) -> None:
        """Do nothing: they are here."""

    def discard(self, shard: Shard) -> bool:
        """Return False: the file itself is what is damaged."""
        return False
