"""Documents out of files: text, JSONL, parquet, gzip and zstd, folders, the stdlib.

Inputs become blocks: bounded pieces of work, in an order that depends on the inputs alone.
A block travels to a worker process, which reads the documents out of it; only where a file
cannot be entered in the middle (JSONL, parquet) does the block carry the bytes themselves.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import zstandard

# About a second of BPE on one core: long against a process's mail, short against the whole.
BLOCK_BYTES = 1 << 20
_SNIFF_BYTES = 8192
_PACKED_BYTES = 1 << 16
"""Of a zstd file, read at once."""
_COMPRESSED = (".gz", ".zst")
_JSONL = (".jsonl", ".ndjson")
_PARQUET = ".parquet"


class Document(NamedTuple):
    """One text and where it came from (for messages: a path, path:line or path#row)."""

    name: str
    text: str


@dataclass(frozen=True)
class Files:
    """Text files, each a document."""

    paths: tuple[Path, ...]
    size: int

    def documents(self) -> Iterator[Document]:
        """Yield the files in order."""
        for path in self.paths:
            yield Document(str(path), read_text(path))


@dataclass(frozen=True)
class Joined:
    """Text files that are one document together, each under a line with its name."""

    name: str
    root: Path
    paths: tuple[Path, ...]
    size: int

    def documents(self) -> Iterator[Document]:
        """Yield the one document."""
        parts = [f"# {path.relative_to(self.root)}\n{read_text(path)}" for path in self.paths]
        yield Document(self.name, "\n".join(parts))


@dataclass(frozen=True)
class Lines:
    """Some lines of a JSONL file, each a document."""

    path: Path
    first_line: int
    raw: bytes
    text_key: str
    size: int

    def documents(self) -> Iterator[Document]:
        """Yield the texts; ValueError names file and line of a broken one."""
        for number, line in enumerate(self.raw.split(b"\n"), self.first_line):
            if line.strip():
                name = f"{self.path}:{number}"
                yield Document(name, _json_text(line, self.text_key, name))


@dataclass(frozen=True)
class Rows:
    """Some rows of a parquet column, each a document."""

    path: Path
    first_row: int
    texts: tuple[str | None, ...]
    size: int

    def documents(self) -> Iterator[Document]:
        """Yield the texts; a null is an empty one."""
        for number, text in enumerate(self.texts, self.first_row):
            yield Document(f"{self.path}#{number}", text or "")


Block = Files | Joined | Lines | Rows


def file_blocks(paths: Iterable[Path], text_key: str) -> Iterator[Block]:
    """Yield the blocks of these files in order; small text files share one."""
    waiting: list[Path] = []
    waiting_bytes = 0
    for path in paths:
        form = _form(path)
        size = path.stat().st_size
        if waiting and (form != "text" or waiting_bytes + size > BLOCK_BYTES):
            yield Files(tuple(waiting), waiting_bytes)
            waiting, waiting_bytes = [], 0
        if form == "text":
            waiting.append(path)
            waiting_bytes += size
        elif form == "jsonl":
            yield from _line_blocks(path, text_key)
        else:
            yield from _row_blocks(path, text_key, size)
    if waiting:
        yield Files(tuple(waiting), waiting_bytes)


def is_text(path: Path) -> bool:
    """Say whether a file is one that can be read here: JSONL, parquet, or without a NUL."""
    if _form(path) != "text":
        return True
    with _opened(path) as (stream, _):
        return b"\0" not in stream.read(_SNIFF_BYTES)


def read_text(path: Path) -> str:
    """Return a text file's content, decompressed; ValueError where it is not UTF-8."""
    with _opened(path) as (stream, _):
        content = stream.read()
    if b"\0" in content[:_SNIFF_BYTES]:
        raise ValueError(
            f"{path} is not a text file (it has NUL bytes; UTF-16 has them too): leave it out"
            f" or convert it to UTF-8"
        )
    return _decoded(content, str(path))


def _form(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    inner = suffixes[:-1] if compressed else suffixes
    last = inner[-1] if inner else ""
    if last == _PARQUET and compressed:
        raise ValueError(f"{path}: parquet is compressed inside; unpack the file first")
    if last == _PARQUET:
        return "parquet"
    return "jsonl" if last in _JSONL else "text"


class _Zstd(io.RawIOBase):
    """The content of zstd frames; zstandard's own reader takes a file cut in a frame for whole."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._ready = raw, memoryview(b"")
        self._frame: Any = None  # the one that has begun and not ended

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the next piece goes; EOFError where a frame has no end."""
        while not self._ready:
            packed = self._raw.read(_PACKED_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a zstd frame")
                return 0
            pieces = []
            while packed:
                frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
                pieces.append(frame.decompress(packed))
                self._frame = None if frame.eof else frame
                packed = frame.unused_data if frame.eof else b""
            self._ready = memoryview(b"".join(pieces))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file for reading its content; also gives the raw file, for its position."""
    try:
        with open(path, "rb") as raw:
            if path.suffix.lower() == ".gz":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
            elif path.suffix.lower() == ".zst":
                yield io.BufferedReader(_Zstd(raw), 1 << 16), raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(
            f"{path} cannot be read ({error or type(error).__name__}); replace the file or"
            f" leave it out"
        ) from error


def _line_blocks(path: Path, text_key: str) -> Iterator[Lines]:
    first_line, consumed = 1, 0
    with _opened(path) as (stream, raw):
        while lines := stream.readlines(BLOCK_BYTES):
            size = raw.tell() - consumed
            consumed += size
            yield Lines(path, first_line, b"".join(lines), text_key, size)
            first_line += len(lines)


def _json_text(line: bytes, text_key: str, name: str) -> str:
    try:
        row = json.loads(_decoded(line, name))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}: not valid JSON ({error.msg} at column {error.colno}); mend or remove the"
            f" line (one JSON object a line)"
        ) from error
    if not isinstance(row, dict) or text_key not in row:
        keys = sorted(row)[:10] if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{name}: no key {text_key!r}, it has {keys}; set --text-key")
    text = row[text_key]
    if not isinstance(text, str):
        raise ValueError(
            f"{name}: {text_key!r} is {type(text).__name__}, not a string; set --text-key to"
            f" the key of the text, or remove the line"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: {text_key!r} holds half a character ({error.reason} at {error.start});"
            f" mend or remove the line"
        ) from error
    return text


def _row_blocks(path: Path, column: str, size: int) -> Iterator[Rows]:
    import pyarrow as pa  # 0.2 s: only where there is parquet
    import pyarrow.parquet as pq

    first, characters = 0, 0
    texts: list[str | None] = []
    try:
        with pq.ParquetFile(path) as file:
            _require_column(file.schema_arrow, column, path)
            rows = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                for text in batch.column(0).to_pylist():
                    texts.append(text)
                    characters += len(text or "")
                    if characters >= BLOCK_BYTES:
                        yield Rows(path, first, tuple(texts), size * len(texts) // rows)
                        first, texts, characters = first + len(texts), [], 0
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} cannot be read as parquet ({error}); replace the file or leave it out"
        ) from error
    if texts:
        yield Rows(path, first, tuple(texts), size * len(texts) // rows)


def _require_column(schema: Any, column: str, path: Path) -> None:
    types = {field.name: str(field.type) for field in schema}
    if column not in types:
        raise ValueError(f"{path}: no column {column!r}, it has {types}; set --text-key")
    if types[column] not in ("string", "large_string", "string_view"):
        raise ValueError(
            f"{path}: column {column!r} holds {types[column]}, not strings; set --text-key to"
            f" the column of the text"
        )


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {error.start} (0x{content[error.start]:02x}) is not UTF-8; convert"
            f" it, for example with `iconv -f latin1 -t utf-8`, or leave it out"
        ) from error
