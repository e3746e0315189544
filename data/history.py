"""Reading a ledger: what a run consumed in the end, when attempts and torn records are settled.

An attempt begins at the position of the checkpoint that it resumed from. All that earlier ones
consumed from there on was undone with their weights, so it is superseded, whether or not the
attempt came as far; `redone` tells whether the samples were the same again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from data.ledger import FORMAT, Header, Skip, list_files, read_skips, record_dtype


class Range(NamedTuple):
    """Positions from start to stop - 1."""

    start: int
    stop: int


class Attempt(NamedTuple):
    """One attempt at a run: `rows` samples of its ranks, by position."""

    number: int
    start: int
    dp_size: int
    rows: int


class History:
    """What a run consumed, sample by sample.

    base: the first position that the ledger knows. counts [P] int64: how often position base + i
    was consumed, superseded rows left out. hashes [P, 2] uint32: of its latest row. redone: rows
    that did an earlier attempt's sample again; changed [n]: positions where they differed.
    idle [P] bool: consumed, and without effect on the weights: skipped, or rolled back.
    notes: what was found in the files that need not matter (torn or damaged records).
    """

    def __init__(self, attempts: list[Attempt], last: Header, base: int, stop: int) -> None:
        self.attempts, self.batch_size, self.order = attempts, last.batch_size, last.order
        self.base = base
        self.counts = np.zeros(stop - base, np.int64)
        self.hashes = np.zeros((stop - base, 2), np.uint32)
        self.idle = np.zeros(stop - base, np.bool_)
        self.redone = 0
        self.changed: NDArray[np.int64] = np.zeros(0, np.int64)
        self.notes: list[str] = []

    def missing(self, stop: int) -> list[Range]:
        """Return the positions from 0 to stop - 1 that were not consumed."""
        known = self.base + len(self.counts)
        lost = [Range(0, min(self.base, stop))]
        lost += ranges(self.counts[: max(0, stop - self.base)] == 0, self.base)
        lost += [Range(known, max(known, stop))]
        return _merged(lost)

    def twice(self, stop: int) -> list[Range]:
        """Return the positions below stop that one history has more than once."""
        return ranges(self.counts[: max(0, stop - self.base)] > 1, self.base)

    def passed_over(self, stop: int) -> list[Range]:
        """Return the positions below stop that left no trace in the weights."""
        return ranges(self.idle[: max(0, stop - self.base)], self.base)

    def extent(self) -> int:
        """Return the end of the samples that follow each other without a gap."""
        gaps = np.flatnonzero(self.counts == 0)
        return self.base + (int(gaps[0]) if len(gaps) else len(self.counts))


def read_history(folder: Path) -> History:
    """Return what the ledger in `folder` says; ValueError where there is none."""
    notes: list[str] = []
    files = [file for path in list_files(folder) if (file := _read_file(path, notes)) is not None]
    if not files:
        raise ValueError(
            f"{folder} holds no ledger: name the folder of a run (longhaul pretrain writes one"
            " since its data is written down)"
        )
    base = min(min(file.header.position, file.low()) for file in files)
    stop = max(base, *(file.high() for file in files))
    history = History([], files[-1].header, base, stop)
    seen = np.zeros(stop - base, np.bool_)
    skips = read_skips(folder)
    for number, group in groupby(files, key=lambda file: file.header.attempt):
        _take(history, seen, number, list(group), notes)
        _pass_over(history, skips.get(number, []))
    history.notes = notes
    return history


def ranges(mask: NDArray[np.bool_], base: int = 0) -> list[Range]:
    """Return where the mask holds, as ranges of base + index."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)) + base
    return [Range(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _merged(parts: Iterable[Range]) -> list[Range]:
    """Return the ranges that are not empty, touching ones as one."""
    merged: list[Range] = []
    for part in parts:
        if merged and merged[-1].stop == part.start < part.stop:
            merged[-1] = Range(merged[-1].start, part.stop)
        elif part.start < part.stop:
            merged.append(part)
    return merged


class _File(NamedTuple):
    header: Header
    positions: NDArray[np.int64]
    hashes: NDArray[np.uint32]

    def low(self) -> int:
        return int(self.positions.min()) if len(self.positions) else self.header.position

    def high(self) -> int:
        return int(self.positions.max()) + 1 if len(self.positions) else self.header.position


def _take(
    history: History, seen: NDArray[np.bool_], number: int, files: list[_File], notes: list[str]
) -> None:
    """Lay one attempt's rows over those of the attempts before it."""
    first = files[0].header
    absent = set(range(first.dp_size)) - {file.header.dp_rank for file in files}
    if absent:
        notes.append(
            f"attempt {number} ran with {first.dp_size} data-parallel ranks, and has no file of"
            f" rank {', '.join(map(str, sorted(absent)))}"
        )
    history.counts[first.position - history.base :] = 0
    history.idle[first.position - history.base :] = False
    positions = np.concatenate([file.positions for file in files])
    hashes = np.concatenate([file.hashes for file in files])
    places = positions - history.base
    again = seen[places]
    different = again & (history.hashes[places] != hashes).any(axis=1)
    history.redone += int(again.sum())
    history.changed = np.union1d(history.changed, positions[different])
    np.add.at(history.counts, places, 1)
    history.hashes[places], seen[places] = hashes, True
    history.attempts.append(Attempt(number, first.position, first.dp_size, len(positions)))


def _pass_over(history: History, skips: list[Skip]) -> None:
    for skip in skips:
        start, stop = (max(0, place - history.base) for place in (skip.start, skip.stop))
        history.idle[start:stop] = True


def _read_file(path: Path, notes: list[str]) -> _File | None:
    content = path.read_bytes()
    line, _, body = content.partition(b"\n")
    try:
        fields = json.loads(line)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        header = Header(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        notes.append(f"{path} is not a ledger file ({error!r}); it is left out")
        return None
    dtype = record_dtype(header.samples)
    count, torn = divmod(len(body), dtype.itemsize)
    records = np.frombuffer(body, dtype, count)
    checks = np.fromiter(_checks(body, dtype.itemsize, count), np.uint32, count)
    good = checks == records["check"]
    whole = int(np.flatnonzero(good)[-1]) + 1 if good.any() else 0
    if torn or whole < count:
        notes.append(f"{path} ends in a torn record, as a kill leaves it; it is left out")
    if not good[:whole].all():
        bad = ", ".join(str(number) for number in np.flatnonzero(~good[:whole])[:10])
        notes.append(f"{path} is damaged: record {bad} has another crc32; left out")
    records = records[good]
    places = records["first"].astype(np.int64)[:, None] + np.arange(header.samples)
    return _File(header, places.reshape(-1), records["hashes"].reshape(-1, 2))


def _checks(body: bytes, size: int, count: int) -> Iterator[int]:
    view = memoryview(body)
    for begin in range(0, count * size, size):
        yield crc32(view[begin : begin + size - 4])
