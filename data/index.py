"""Opening a corpus: random access to the documents of a folder of shards, damage found.

Every document's crc32 is verified when a process first touches it; sizes, names and indices
when the corpus is opened. A damaged document stops the run, or, with on_damage="skip", keeps
its place in the order and is named: holes do not shift the samples behind them.
"""

from __future__ import annotations

import errno
import hashlib
import io
import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from data.files import Files
from data.patience import is_away
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
_HEADERS = threading.Lock()


class Table:
    """One shard's index in memory, and which of its documents were found good."""

    def __init__(self, shard: Shard, rows: NDArray[Any], *, damaged: bool = False) -> None:
        self.shard = shard
        self.lengths: NDArray[np.int64] = rows["length"].astype(np.int64)
        self.offsets: NDArray[np.int64] = rows["offset"].astype(np.int64)
        self.crc32: NDArray[np.uint32] = rows["crc32"].astype(np.uint32)
        self.state = np.full(len(rows), _DAMAGED if damaged else _UNKNOWN, dtype=np.uint8)


class Shards:
    """Documents of a prepared folder by number, in shard order; safe to read from several threads.

    Who inherits says how a shard's table is found: all in memory (Corpus), or read when asked for
    (data.wide.WideCorpus).
    """

    def __init__(
        self,
        files: Files,
        manifest: Manifest,
        shards: Sequence[Shard],
        damage: list[str],
        on_damage: OnDamage,
    ) -> None:
        self.folder = files.where
        self.manifest = manifest
        self._files = files
        self._shards = list(shards)
        self._first = [0, *accumulate(shard.documents for shard in shards)]
        self._dtype = np.dtype(manifest.dtype)
        self._on_damage = on_damage
        self._damage = damage
        self._lock = threading.Lock()
        self._verified: tuple[int, bytes] | None = None  # the document last verified, read at once
        # Without a shard's index its documents have no place in the order, and every sample
        # becomes another one: then the fingerprint has to differ as well.
        kept = {shard.name for shard in self._shards}
        dropped = [shard.name for shard in manifest.shards if shard.name not in kept]
        identity = "\n".join([manifest.to_json(), *dropped])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self.documents = self._first[-1]
        self.tokens = sum(shard.tokens for shard in shards)
        self.vocab_size = manifest.vocab_size
        self.tokenizer_sha256 = manifest.tokenizer_sha256
        self.end_of_document = manifest.end_of_document

    def table(self, number: int) -> Table:
        """Return the index of a shard, by its place among the shards."""
        raise NotImplementedError

    def first(self, number: int) -> int:
        """Return the number of a shard's first document."""
        return self._first[number]

    def length(self, document: int) -> int:
        """Return the tokens of a document."""
        table, row = self._row(document)
        return int(table.lengths[row])

    @property
    def damage(self) -> tuple[str, ...]:
        """What was skipped so far, each entry naming its file (on_damage="skip")."""
        with self._lock:
            return tuple(self._damage)

    def describe(self) -> str:
        """Return what there is, as JSON: the manifest."""
        return self.manifest.to_json()

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
        table, row = self._row(document)
        if table.state[row] == _UNKNOWN:
            fault = self._find_fault(document)
            if fault and self._files.discard(table.shard):
                fault = self._find_fault(document)
            with self._lock:
                if table.state[row] == _UNKNOWN and fault and fault not in self._damage:
                    self._damage.append(fault)
                table.state[row] = _DAMAGED if fault else _GOOD
        if table.state[row] == _GOOD:
            return True
        if self._on_damage == "stop":
            raise ValueError(self._find_fault(document) or f"document {document} is damaged")
        return False

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens [start, stop) of a document, int64; ValueError if it is damaged."""
        return self.read_stored(document, start, stop).astype(np.int64)

    def read_stored(self, document: int, start: int, stop: int) -> TokenArray:
        """Return tokens [start, stop) of a document as stored: read-only uint16 or uint32."""
        table, row = self._row(document)
        assert 0 <= start <= stop <= table.lengths[row], (document, start, stop)
        if not self.intact(document):
            raise ValueError(f"document {document} of {self.folder} is damaged; see `damage`")
        size = self._dtype.itemsize
        held = self._verified
        if held is not None and held[0] == document:
            return np.frombuffer(held[1], self._dtype, stop - start, start * size)
        offset = int(table.offsets[row]) + start * size
        try:
            content = self._files.open(table.shard).read((stop - start) * size, offset)
        except OSError as error:
            raise ValueError(self._describe(document, f"cannot be read: {error}")) from error
        return np.frombuffer(content, dtype=self._dtype)

    def _row(self, document: int) -> tuple[Table, int]:
        """Return the table that lists a document, and where."""
        number = bisect_right(self._first, document) - 1
        return self.table(number), document - self._first[number]

    def _find_fault(self, document: int) -> str | None:
        table, row = self._row(document)
        offset = int(table.offsets[row])
        left = int(table.lengths[row]) * self._dtype.itemsize
        crc, content = 0, b""
        try:
            file = self._files.open(table.shard)
            while left > 0:
                content = file.read(min(left, _CRC_BYTES), offset)
                crc = crc32(content, crc)
                offset += len(content)
                left -= len(content)
        except OSError as error:
            if is_away(error) and error.errno != errno.EIO:
                # No damage to leave out: another rank may read it, and would then read other data.
                raise ValueError(
                    f"{self._files.shown(table.shard.name)} cannot be read: {error}, for as long as"
                    " that is waited for; start the run again when its file system is back"
                ) from error
            return self._describe(document, f"cannot be read: {error}")
        expected = int(table.crc32[row])
        if crc == expected:
            whole = int(table.lengths[row]) * self._dtype.itemsize
            self._verified = (document, content) if content and len(content) == whole else None
            return None
        return self._describe(document, f"has crc32 {crc:08x}, its index says {expected:08x}")

    def _describe(self, document: int, fault: str) -> str:
        table, row = self._row(document)
        return (
            f"{self._files.shown(table.shard.name)}: document"
            f" {row} ({int(table.lengths[row])} tokens)"
            f" {fault}; restore the shard or set data.on_damage=skip"
        )


class Corpus(Shards):
    """A corpus whose whole index is in memory, about 30 bytes a document."""

    def __init__(
        self,
        files: Files,
        manifest: Manifest,
        tables: list[Table],
        damage: list[str],
        on_damage: OnDamage,
    ) -> None:
        super().__init__(files, manifest, [table.shard for table in tables], damage, on_damage)
        self.lengths: NDArray[np.int64] = np.concatenate([table.lengths for table in tables])
        self.lengths.setflags(write=False)
        for number, table in enumerate(tables):
            table.lengths = self.lengths[self._first[number] : self._first[number + 1]]
        self._tables = tables

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
        damage = [foreign(files.shown(name)) for name in files.unlisted(manifest)]
        files.fetch_indices(manifest)
        tables = []
        for shard in manifest.shards:
            fault = files.fault(shard)
            if fault:
                damage.append(fault)
            try:
                rows = read_index(files, shard, np.dtype(manifest.dtype))
                tables.append(Table(shard, rows, damaged=fault is not None))
            except ValueError as error:
                damage.append(str(error))
        if damage and on_damage == "stop":
            more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
            raise ValueError(damage[0] + more)
        if not tables:
            raise ValueError(
                f"{folder} holds no readable document ({manifest.documents} listed);"
                f" run `longhaul prepare` first"
            )
        return cls(files, manifest, tables, damage, on_damage)

    def table(self, number: int) -> Table:
        """Return the index of a shard, by its place among the shards."""
        return self._tables[number]

    def length(self, document: int) -> int:
        """Return the tokens of a document."""
        return int(self.lengths[document])


def foreign(path: str) -> str:
    """Return what is wrong with a shard that nobody listed."""
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
    index = _parse(content, shard.documents)
    ends = index["offset"].astype(np.int64) + index["length"].astype(np.int64) * dtype.itemsize
    assert index.dtype == INDEX_DTYPE and len(index) == shard.documents
    assert int(ends.max()) <= shard.bytes
    return index


def _parse(content: bytes, documents: int) -> NDArray[Any]:
    """Return the rows of an index file."""
    # Not np.load at once: it reads the header with `ast`, which Python 3.11 cannot do in two
    # threads at a time ("AST constructor recursion depth mismatch", seen with 3.11.7).
    header = io.BytesIO()
    fields = {"descr": INDEX_DTYPE.descr, "fortran_order": False, "shape": (documents,)}
    np.lib.format.write_array_header_1_0(header, fields)
    if content.startswith(header.getvalue()):
        return np.frombuffer(content, dtype=INDEX_DTYPE, offset=len(header.getvalue()))
    with _HEADERS:  # as another numpy may write it
        found: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return found
