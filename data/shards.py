"""Writing a corpus: tar shards of raw tokens, one sidecar index each, one manifest.

A shard is an ordinary WebDataset tar. Each member `<shard>-<document>.tokens.bin` holds one
document as little-endian uint16 or uint32, nothing else. Beside it `<shard>.tar.idx.npy`
says where each document lies and what its crc32 is: WebDataset itself does not notice a
flipped bit, nor a shard that was cut between two members.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from data.durable import replace_durably, write_atomically

FORMAT = "longhaul-shards-1"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
INDEX_SUFFIX = ".idx.npy"
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u8"), ("crc32", "<u4")])
# 64M tokens are 128 MB as uint16: few files at a terabyte, a small loss when one is damaged.
SHARD_TOKENS = 1 << 26
_TAR_BLOCK = tarfile.BLOCKSIZE

TokenArray = NDArray[np.unsignedinteger[Any]]


class Vocabulary(Protocol):
    """What a shard has to know about the tokenizer that made it."""

    @property
    def name(self) -> str:
        """A short name for people."""

    @property
    def sha256(self) -> str:
        """The hash of the tokenizer's JSON text."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def end_of_document(self) -> int:
        """The id that closes every document."""

    def to_json(self) -> str:
        """The text whose sha256 is `sha256`."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the stored dtype: little-endian uint16 where every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest lists it."""

    name: str
    documents: int
    tokens: int
    bytes: int
    sha256: str
    index_sha256: str


def index_bytes(shard: Shard) -> int:
    """Return about how large a shard's index is: the head that numpy writes, and its rows."""
    return 128 + shard.documents * INDEX_DTYPE.itemsize


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, and which tokenizer made it."""

    dtype: str
    vocab_size: int
    end_of_document: int
    tokenizer: str
    tokenizer_sha256: str
    documents: int
    tokens: int
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, tokenizer: Vocabulary, shards: Iterable[Shard]) -> Manifest:
        """Return the manifest of these shards, written with this tokenizer."""
        listed = tuple(shards)
        return cls(
            dtype=token_dtype(tokenizer.vocab_size).str,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            tokenizer=tokenizer.name,
            tokenizer_sha256=tokenizer.sha256,
            documents=sum(shard.documents for shard in listed),
            tokens=sum(shard.tokens for shard in listed),
            shards=listed,
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Return the manifest of `folder`; ValueError where there is no good one."""
        path = folder / MANIFEST
        if not path.is_file() and (folder / "train" / MANIFEST).is_file():
            raise ValueError(
                f"{path} does not exist, but {folder / 'train'} holds shards; name that folder"
            )
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist: {folder} holds no finished shards; run"
                f" `longhaul prepare` (again: it continues where it was stopped)"
            )
        return cls.parse(path.read_bytes(), path)

    @classmethod
    def parse(cls, content: bytes, where: str | Path) -> Manifest:
        """Return the manifest in these bytes; ValueError, naming `where`, if it is none."""
        try:
            fields = json.loads(content)
            if fields.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
            manifest = cls(shards=shards, **fields)
            manifest._check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where} is not a manifest of longhaul shards ({error!r}); restore it, or run"
                f" `longhaul prepare --force`"
            ) from error
        return manifest

    def _check(self) -> None:
        if np.dtype(self.dtype) != token_dtype(self.vocab_size):
            raise ValueError(f"dtype={self.dtype} does not fit vocab_size={self.vocab_size}")
        names = [shard.name for shard in self.shards]
        if len(set(names)) < len(names) or any(Path(name).name != name for name in names):
            raise ValueError("its shards are not different files of this folder")
        for count in ("documents", "tokens"):
            listed = sum(getattr(shard, count) for shard in self.shards)
            if listed != getattr(self, count):
                raise ValueError(f"{count}={getattr(self, count)}, its shards hold {listed}")

    def to_json(self) -> str:
        """Return the text of manifest.json: the same manifest always gives the same bytes."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Write manifest.json; it comes last, so a folder that has one is complete."""
        write_atomically(folder / MANIFEST, self.to_json().encode())

    def require_tokenizer(self, tokenizer: Vocabulary, where: str | Path) -> None:
        """Raise ValueError if the shards were written with another tokenizer."""
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise ValueError(
                f"{where} was written with tokenizer {self.tokenizer}"
                f" (sha256 {self.tokenizer_sha256[:12]}, {self.vocab_size} ids), not with"
                f" {tokenizer.name} (sha256 {tokenizer.sha256[:12]}, {tokenizer.vocab_size}"
                f" ids); use the {TOKENIZER} beside its shards, or prepare the text again"
            )


class ShardWriter:
    """Writes one shard. The same documents give the same bytes: no times, no owners."""

    def __init__(self, folder: Path, number: int, vocab_size: int) -> None:
        self.tokens = 0
        self._folder = folder
        self._name = f"shard-{number:06d}.tar"
        self._prefix = f"{number:06d}"
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._index: list[tuple[int, int, int]] = []
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._temporary = folder / (self._name + ".tmp")
        self._stream = open(self._temporary, "wb")

    def add(self, tokens: TokenArray | NDArray[np.int64]) -> None:
        """Append one document, its closing end-of-document token included."""
        if len(tokens) == 0:
            raise ValueError(f"{self._name}: a document of 0 tokens cannot be stored; leave it out")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(
                f"{self._name}: token id {low if low < 0 else high} is outside vocab_size="
                f"{self._vocab_size}; write the shards with the tokenizer that made the ids"
            )
        content = tokens.astype(self._dtype, copy=False).tobytes()
        member = tarfile.TarInfo(f"{self._prefix}-{len(self._index):08d}.tokens.bin")
        member.size = len(content)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._index.append((self._bytes, len(tokens), crc32(content)))
        self._write(content)
        self._write(bytes(-len(content) % _TAR_BLOCK))
        self.tokens += len(tokens)

    def _write(self, content: bytes) -> None:
        self._stream.write(content)
        self._hash.update(content)
        self._bytes += len(content)

    def close(self) -> Shard:
        """Return the finished shard: index and tar lie under their names, durably."""
        self._write(bytes(2 * _TAR_BLOCK))
        index = io.BytesIO()
        np.save(index, np.array(self._index, dtype=INDEX_DTYPE))
        write_atomically(self._folder / (self._name + INDEX_SUFFIX), index.getvalue())
        replace_durably(self._temporary, self._folder / self._name, self._stream)
        return Shard(
            name=self._name,
            documents=len(self._index),
            tokens=self.tokens,
            bytes=self._bytes,
            sha256=self._hash.hexdigest(),
            index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
        )

    def abandon(self) -> None:
        """Drop what was written so far."""
        self._stream.close()
        self._temporary.unlink(missing_ok=True)


class ShardSequence:
    """Writes documents into numbered shards of at most `shard_tokens` tokens.

    A document is never cut: one that is longer has a shard of its own.
    """

    def __init__(
        self, folder: Path, vocab_size: int, shard_tokens: int, finished: Iterable[Shard] = ()
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.finished = list(finished)
        self._folder = folder
        self._vocab_size = vocab_size
        self._shard_tokens = shard_tokens
        self._writer: ShardWriter | None = None

    def add(self, tokens: TokenArray | NDArray[np.int64]) -> Shard | None:
        """Append a document; return the shard that was finished before it, if one was."""
        full = self._writer and self._writer.tokens + len(tokens) > self._shard_tokens
        closed = self.close() if full else None
        if self._writer is None:
            self._writer = ShardWriter(self._folder, len(self.finished), self._vocab_size)
        self._writer.add(tokens)
        return closed

    def close(self) -> Shard | None:
        """Finish the open shard, if there is one, and return it."""
        if self._writer is None:
            return None
        self.finished.append(self._writer.close())
        self._writer = None
        return self.finished[-1]

    def abandon(self) -> None:
        """Drop the open shard; the finished ones stay."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None


def write_corpus(
    folder: str | Path,
    documents: Iterable[TokenArray | NDArray[np.int64]],
    *,
    tokenizer: Vocabulary,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Write token arrays as a complete corpus and return its manifest.

    Each document is closed with the tokenizer's end-of-document id here. For texts, use
    `data.prepare.prepare`; this is for tokens that come from elsewhere (tasks, tests).
    """
    path = Path(folder)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; choose an empty folder for the shards")
    sequence = ShardSequence(path, tokenizer.vocab_size, shard_tokens)
    for document in documents:
        sequence.add(np.append(document, tokenizer.end_of_document))
    sequence.close()
    write_atomically(path / TOKENIZER, tokenizer.to_json().encode())
    manifest = Manifest.of(tokenizer, sequence.finished)
    manifest.write(path)
    return manifest
