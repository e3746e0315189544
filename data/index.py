"""Opening a corpus: random access to the documents of a folder of shards, damage found.

Every document's crc32 is verified when a process first touches it; sizes, names and indices
when the corpus is opened. A damaged document stops the run, or, with on_damage="skip", keeps
its place in the order and is named: holes do not shift the samples behind them.
"""

from __future__ import annotations

import hashlib
import io
import threading
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.files import Files, OpenFile
from data.remote import Remote, open_files
from data.shards import (
    INDEX_DTYPE,
    INDEX_SUFFIX,
    TOKENIZER,
    Manifest,
    Shard,
    TokenArray,
    index_bytes,
)
from data.tokenizer import Tokenizer, read_tokenizer

OnDamage = Literal["stop", "skip"]
_CRC_BYTES = 8 << 20
_TOKENIZER_BYTES = 1 << 20  # about; large vocabularies have more
_UNKNOWN, _GOOD, _DAMAGED = 0, 1, 2


class Corpus:
    """Documents of a prepared folder, in shard order; safe to read from several threads."""

    def __init__(
        self,
        files: Files,
        manifest: Manifest,
        indices: list[tuple[Shard, NDArray[Any]]],
        damage: list[str],
        on_damage: OnDamage,
        absent: set[str],
    ) -> None:
        self.folder = files.where
        self._files = files
        self.manifest = manifest
        index = np.concatenate([rows for _, rows in indices])
        self.lengths: NDArray[np.int64] = index["length"].astype(np.int64)
        self.lengths.setflags(write=False)
        self._shards = [shard for shard, _ in indices]
        self._first = np.cumsum([0, *(len(rows) for _, rows in indices)])
        self._offsets = index["offset"].astype(np.int64)
        self._crc32 = index["crc32"]
        self._dtype = np.dtype(manifest.dtype)
        self._on_damage = on_damage
        self._damage = damage
        self._lock = threading.Lock()
        self._state = np.zeros(len(index), dtype=np.uint8)
        for number, (shard, _) in enumerate(indices):
            if shard.name in absent:
                self._state[self._first[number] : self._first[number + 1]] = _DAMAGED
        # Without a shard's index its documents have no place in the order, and every sample
        # becomes another one: then the fingerprint has to differ as well.
        kept = {shard.name for shard in self._shards}
        dropped = [shard.name for shard in manifest.shards if shard.name not in kept]
        identity = "\n".join([manifest.to_json(), *dropped])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    @classmethod
    def open(
        cls, folder: str | Path, on_damage: OnDamage = "stop", remote: Remote | None = None
    ) -> Corpus:
        """Return the corpus in `folder` (the one that holds manifest.json), or behind such a URL.

        Raises ValueError naming file, value and remedy for a missing, foreign, resized or
        mixed-up file; with on_damage="skip" such a shard is listed in `damage` instead.
        """
        if on_damage not in ("stop", "skip"):
            raise ValueError(f"on_damage={on_damage!r} is neither 'stop' nor 'skip'")
        files = open_files(folder, remote)
        manifest = files.manifest()
        damage = [_foreign(files.shown(name)) for name in files.unlisted(manifest)]
        files.fetch_indices(manifest)
        indices, absent = [], set()
        for shard in manifest.shards:
            fault = files.fault(shard)
            if fault:
                damage.append(fault)
                absent.add(shard.name)
            try:
                indices.append((shard, read_index(files, shard, np.dtype(manifest.dtype))))
            except ValueError as error:
                damage.append(str(error))
        if damage and on_damage == "stop":
            more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
            raise ValueError(damage[0] + more)
        if not indices:
            raise ValueError(
                f"{folder} holds no readable document ({manifest.documents} listed);"
                f" run `longhaul prepare` first"
            )
        return cls(files, manifest, indices, damage, on_damage, absent)

    @property
    def damage(self) -> tuple[str, ...]:
        """What was skipped so far, each entry naming its file (on_damage="skip")."""
        with self._lock:
            return tuple(self._damage)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer kept beside the shards; ValueError if it is another one."""
        where = self._files.shown(TOKENIZER)
        try:
            content = self._files.read(TOKENIZER, self.manifest.tokenizer_sha256, _TOKENIZER_BYTES)
        except OSError as error:
            raise ValueError(f"{where} cannot be read ({error}); restore it") from error
        tokenizer = read_tokenizer(content, where)
        self.manifest.require_tokenizer(tokenizer, self.folder)
        return tokenizer

    def intact(self, document: int) -> bool:
        """Say whether a document can be read; the first call verifies its crc32.

        Raises ValueError for a damaged one with on_damage="stop".
        """
        if self._state[document] == _UNKNOWN:
            fault = self._find_fault(document)
            if fault and self._files.discard(self._shards[self._shard_of(document)]):
                fault = self._find_fault(document)
            with self._lock:
                if self._state[document] == _UNKNOWN and fault:
                    self._damage.append(fault)
                self._state[document] = _DAMAGED if fault else _GOOD
        if self._state[document] == _GOOD:
            return True
        if self._on_damage == "stop":
            raise ValueError(self._find_fault(document) or f"document {document} is damaged")
        return False

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens [start, stop) of a document, int64; ValueError if it is damaged."""
        return self.read_stored(document, start, stop).astype(np.int64)

    def read_stored(self, document: int, start: int, stop: int) -> TokenArray:
        """Return tokens [start, stop) of a document as stored: read-only uint16 or uint32."""
        assert 0 <= start <= stop <= self.lengths[document], (document, start, stop)
        if not self.intact(document):
            raise ValueError(f"document {document} of {self.folder} is damaged; see `damage`")
        size = self._dtype.itemsize
        offset = int(self._offsets[document]) + start * size
        try:
            content = self._open(document).read((stop - start) * size, offset)
        except OSError as error:
            raise ValueError(self._describe(document, f"cannot be read: {error}")) from error
        return np.frombuffer(content, dtype=self._dtype)

    def _shard_of(self, document: int) -> int:
        return int(np.searchsorted(self._first, document, side="right")) - 1

    def _open(self, document: int) -> OpenFile:
        return self._files.open(self._shards[self._shard_of(document)])

    def _find_fault(self, document: int) -> str | None:
        offset = int(self._offsets[document])
        left = int(self.lengths[document]) * self._dtype.itemsize
        crc = 0
        try:
            file = self._open(document)
            while left > 0:
                content = file.read(min(left, _CRC_BYTES), offset)
                crc = zlib.crc32(content, crc)
                offset += len(content)
                left -= len(content)
        except OSError as error:
            return self._describe(document, f"cannot be read: {error}")
        expected = int(self._crc32[document])
        if crc == expected:
            return None
        return self._describe(document, f"has crc32 {crc:08x}, its index says {expected:08x}")

    def _describe(self, document: int, fault: str) -> str:
        number = self._shard_of(document)
        return (
            f"{self._files.shown(self._shards[number].name)}: document"
            f" {document - int(self._first[number])} ({int(self.lengths[document])} tokens)"
            f" {fault}; restore the shard or set data.on_damage=skip"
        )


def _foreign(path: str) -> str:
    return f"{path} is not in the manifest beside it: a foreign shard; move it away"


def read_index(files: Files, shard: Shard, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a shard's sidecar (INDEX_DTYPE); ValueError if it is missing or another's."""
    name = shard.name + INDEX_SUFFIX
    path = files.shown(name)
    remedy = "restore it, set data.on_damage=skip, or run `longhaul prepare --force`"
    try:
        content = files.read(name, shard.index_sha256, index_bytes(shard))
    except OSError as error:
        raise ValueError(f"{path} is missing ({error.strerror or error}); {remedy}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != shard.index_sha256:
        raise ValueError(
            f"{path} is not the index of this shard: sha256 {found[:12]}, the manifest says"
            f" {shard.index_sha256[:12]}; {remedy}"
        )
    index: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    ends = index["offset"].astype(np.int64) + index["length"].astype(np.int64) * dtype.itemsize
    assert index.dtype == INDEX_DTYPE and len(index) == shard.documents
    assert int(ends.max()) <= shard.bytes
    return index
