"""What a run consumed, written down as it goes: which samples, and a hash of each.

    run_dir/ledger/attempt-00002.rank-00001.ledger     one file an attempt and data-parallel rank

A line of JSON, then records of one size, one a step: the first position, two crc32 for each of
the rank's samples, and a crc32 of the record. Files are only ever appended to, so whatever a
kill -9 leaves is whole records and at most one torn one at the end. Positions mean the same
samples in every layout, so the ledgers of two runs can be compared whatever ran them.

Tokens alone would not do: the label of a sample's last token is the first token of another
sample, and where memory begins anew cannot be seen in them. So the second hash takes in labels,
starts and documents.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from data.durable import write_atomically

if TYPE_CHECKING:
    from data.streams import Batch

FORMAT = "longhaul-ledger-1"
FOLDER = "ledger"
_PATTERN = "attempt-?????.rank-?????.ledger"
_SKIPPED = "attempt-?????.skipped"
_COULD_NOT = "the data ledger cannot be written"


@dataclass(frozen=True)
class Header:
    """The first line of a ledger file."""

    attempt: int  # 1 is the run's first; a later one supersedes from its position on
    dp_rank: int
    dp_size: int
    position: int  # samples that the run had consumed when the attempt began
    samples: int  # of this rank in one step
    batch_size: int  # of all ranks in one step
    order: dict[str, Any]  # what decides which sample is which, for people

    def to_line(self) -> bytes:
        """Return the line, its line break included."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True).encode() + b"\n"


def record_dtype(samples: int) -> np.dtype[Any]:
    """Return one step's record: 12 bytes and 8 a sample."""
    return np.dtype([("first", "<u8"), ("hashes", "<u4", (samples, 2)), ("check", "<u4")])


class Skip(NamedTuple):
    """Samples start to stop - 1, which left no trace in the weights, and why."""

    start: int
    stop: int
    why: str


def list_files(folder: Path) -> list[Path]:
    """Return the files of a ledger, by attempt and rank."""
    return sorted(folder.glob(_PATTERN))


def read_skips(folder: Path) -> dict[int, list[Skip]]:
    """Return what each attempt passed over, a last line cut short by a crash left out."""
    found = {}
    for path in sorted(folder.glob(_SKIPPED)):
        number = int(path.stem.removeprefix("attempt-"))
        lines = path.read_text().splitlines(keepends=True)
        found[number] = [Skip(**json.loads(line)) for line in lines if line.endswith("\n")]
    return found


def next_attempt(folder: Path) -> int:
    """Return the number of the attempt that begins now."""
    numbers = [int(path.name.split(".")[0].removeprefix("attempt-")) for path in list_files(folder)]
    return max(numbers, default=0) + 1


class Ledger:
    """One rank's file of one attempt. What cannot be written waits, and `sync` says so."""

    def __init__(self, folder: Path, header: Header) -> None:
        """Begin the file; OSError where that fails."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"attempt-{header.attempt:05d}.rank-{header.dp_rank:05d}.ledger"
        write_atomically(path, header.to_line())
        self._samples = header.samples
        self._dtype = record_dtype(header.samples)
        self._path = path
        self._lock = threading.Lock()  # a save syncs beside training
        self._descriptor = os.open(path, os.O_WRONLY)
        # Bytes of the file that are on disk; what follows them, of it handed over already.
        self._safe, self._rest, self._handed = len(header.to_line()), bytearray(), 0
        self._losses = 0
        # Every rank passes over the same samples, and one writes that down.
        self._skipped: Path | None = None
        if header.dp_rank == 0:
            self._skipped = folder / f"attempt-{header.attempt:05d}.skipped"

    def recording(self, steps: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """Yield each step's micro-batches once they are written down.

        Before, not after, the step: nothing is trained on that is not in the ledger. A step that
        was written down and then killed is in no checkpoint, and a later attempt supersedes it.
        """
        for batches in steps:
            self.append(batches)
            yield batches

    def append(self, batches: list[Batch]) -> None:
        """Write down a step's micro-batches, and hand them to the operating system.

        A full disk does not end the step: the record is kept, and tried again with the next.
        """
        record = np.zeros((), self._dtype)
        record["first"] = batches[0].first_position
        record["hashes"] = [pair for batch in batches for pair in hash_samples(batch)]
        record["check"] = crc32(record.tobytes()[:-4])
        with self._lock:
            self._rest += record.tobytes()
            try:
                self._write()
            except OSError:
                pass  # sync, which no checkpoint goes without, raises it if it lasts

    def skip(self, skip: Skip) -> None:
        """Write down, on disk, that samples were passed over. OSError."""
        if self._skipped is None:
            return
        with self._skipped.open("a") as file:
            file.write(json.dumps(skip._asdict()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def sync(self) -> None:
        """Bring everything to disk; OSError where that fails. Before a checkpoint counts.

        Safe to call in another thread than the one that appends.
        """
        try:
            with self._lock:
                self._write()
                count, losses = len(self._rest), self._losses
            os.fsync(self._descriptor)
        except OSError as error:
            with self._lock:
                self._begin_again()
            raise OSError(error.errno, f"{_COULD_NOT}: {error.strerror}") from error
        with self._lock:
            if losses == self._losses:
                self._safe, self._handed = self._safe + count, self._handed - count
                del self._rest[:count]

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _write(self) -> None:
        try:
            while self._handed < len(self._rest):
                left, place = self._rest[self._handed :], self._safe + self._handed
                self._handed += os.pwrite(self._descriptor, left, place)
        except OSError:
            self._begin_again()
            raise

    def _begin_again(self) -> None:
        """Hand over again all that is not on disk: a server that was lost may have lost it too."""
        self._handed, self._losses = 0, self._losses + 1
        with contextlib.suppress(OSError):
            fresh = os.open(self._path, os.O_WRONLY)
            os.dup2(fresh, self._descriptor, inheritable=False)
            os.close(fresh)


class NoLedger:
    """What the ranks have whose data-parallel peer writes the same samples down."""

    def recording(self, steps: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """Yield the steps as they are."""
        yield from steps

    def skip(self, skip: Skip) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def hash_samples(batch: Batch) -> Iterator[tuple[int, int]]:
    """Yield (crc32 of tokens, crc32 of labels, starts and documents) of each row.

    Ids are hashed as little-endian int32, whatever the batch holds them in.
    """
    documents = getattr(batch, "documents", None)
    for row in range(len(batch.tokens)):
        tokens = batch.tokens[row].numpy().astype("<i4").data
        labels = batch.labels[row].numpy().astype("<i4").data
        rest = crc32(batch.starts[row].numpy().tobytes(), crc32(labels))
        if documents is not None:
            rest = crc32(documents[row].numpy().astype("<i4").data, rest)
        yield crc32(tokens), rest
