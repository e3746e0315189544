"""Which documents an epoch holds, and in what order: of one corpus or a mixture, bounded in memory.

A corpus is read in passes: pass k has the blocks of the corpus in one order and the documents of
each block in another. A block is a shard, or everything in one. An epoch takes the same number of
segments of each corpus, its quota, where the epoch before stopped; it is cut into windows, and the
documents of a window are shuffled together. So any window of any epoch is a pure function of the
seed, is found without those before it, and needs the lengths of its own blocks only.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]

# What is shuffled, in the keys of the random streams: none of them shares one with another.
_DOCUMENTS, _BLOCKS, _WINDOW = 1, 2, 3


class Block(Protocol):
    """Some documents whose lengths are known together."""

    @property
    def lengths(self) -> NDArray[np.integer]:
        """Tokens of each document."""


class Source(Protocol):
    """The documents of a corpus, numbered block after block."""

    @property
    def documents(self) -> int:
        """How many documents there are."""

    @property
    def segments(self) -> Int64Array:
        """Segments of each block: its documents' together, none of two documents."""

    def first(self, block: int) -> int:
        """Return the number of a block's first document."""

    def block(self, block: int) -> Block:
        """Return a block; whoever holds it keeps its documents quick to read."""

    def length(self, document: int) -> int:
        """Return the tokens of a document."""


class Everything:
    """A corpus as one block: its lengths are in memory, and all its documents are shuffled."""

    def __init__(self, lengths: Int64Array, segment_len: int) -> None:
        if len(lengths) == 0:
            raise ValueError("the corpus holds 0 documents; prepare one with at least 1")
        if int(lengths.min()) < 1:
            raise ValueError(
                f"document {int(lengths.argmin())} has {int(lengths.min())} tokens; each needs"
                f" at least 1 (its end-of-document token): prepare the corpus again"
            )
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.documents = len(lengths)
        self.segments = np.array([count_segments(self.lengths, segment_len).sum()])

    def first(self, block: int) -> int:
        """Return 0: there is one block."""
        return 0

    def block(self, block: int) -> Everything:
        """Return all documents."""
        return self

    def length(self, document: int) -> int:
        """Return the tokens of a document."""
        return int(self.lengths[document])


def count_segments(lengths: NDArray[np.integer], segment_len: int) -> Int64Array:
    """Return the segments of documents of these lengths, each cut by itself."""
    return -(-lengths.astype(np.int64, copy=False) // segment_len)


def random_order(count: int, seed: int, epoch: int, key: tuple[int, ...] = ()) -> Int64Array:
    """Return a permutation of `count` things, the same on every machine and version."""
    # Sorted raw PCG64 output, not Generator.permutation: numpy promises the bit streams
    # of its generators for ever, but not what Generator makes of them (NEP 19).
    source = np.random.PCG64(np.random.SeedSequence((seed, epoch), spawn_key=key))
    order = np.argsort(source.random_raw(count), kind="stable")
    return order.astype(np.int64, copy=False)


class _Items(NamedTuple):
    """Documents in order, each with how many of its segments are meant."""

    documents: Int64Array
    counts: Int64Array
    begin: int  # the first document's first segment: above 0 where the document is cut
    held: list[Block]


class Passes:
    """One corpus read again and again.

    Segments are numbered through: pass k holds k * segments to (k + 1) * segments - 1.
    """

    def __init__(
        self, source: Source, *, seed: int, segment_len: int, key: tuple[int, ...] | None
    ) -> None:
        """key: None for a corpus that is the whole order, else a number of its own in a mixture."""
        self.source = source
        self.segments = int(source.segments.sum())
        self._segment_len = segment_len
        self._seed, self._key = seed, key
        blocks = len(source.segments)
        # Two of each: a window, and a reader that works ahead, cross from one to the next.
        self._of_pass = lru_cache(maxsize=2)(self._shuffle_blocks)
        self._of_block = lru_cache(maxsize=1 if blocks == 1 else 2)(self._shuffle_documents)

    def _shuffle_blocks(self, number: int) -> tuple[Int64Array, Int64Array]:
        """Return the blocks of a pass in order, and the segments up to the end of each."""
        key = (_BLOCKS, *(self._key or ()))
        order = random_order(len(self.source.segments), self._seed, number, key)
        return order, np.cumsum(self.source.segments[order])

    def _shuffle_documents(self, number: int, block: int) -> tuple[Block, Int64Array, Int64Array]:
        """Return a block, its documents in the order of a pass, and the segments up to each end."""
        held = self.source.block(block)
        key = () if self._key is None else (_DOCUMENTS, *self._key, block)
        order = random_order(len(held.lengths), self._seed, number, key)
        ends = np.cumsum(count_segments(held.lengths, self._segment_len)[order])
        first = self.source.first(block)
        return held, order + first if first else order, ends

    def _find(self, segment: int) -> tuple[int, int, int]:
        """Return the pass and the block that hold a segment, and the block's first segment."""
        number, within = divmod(segment, self.segments)
        order, ends = self._of_pass(number)
        place = int(np.searchsorted(ends, within, side="right"))
        block = int(order[place])
        first = number * self.segments + int(ends[place] - self.source.segments[block])
        return number, block, first

    def document_start(self, segment: int) -> int:
        """Return the first segment of the document that holds a segment."""
        number, block, first = self._find(segment)
        _, _, ends = self._of_block(number, block)
        place = int(np.searchsorted(ends, segment - first, side="right"))
        return first + (int(ends[place - 1]) if place else 0)

    def items(self, start: int, stop: int) -> _Items:
        """Return the documents of segments [start, stop), which is not empty, in order."""
        documents: list[Int64Array] = []
        counts: list[Int64Array] = []
        held: list[Block] = []
        begin, at = 0, start
        while at < stop:
            number, block, first = self._find(at)
            kept, order, ends = self._of_block(number, block)
            low, high = at - first, min(stop - first, int(ends[-1]))
            i, j = np.searchsorted(ends, (low, high - 1), side="right")
            cut = np.minimum(ends[i : j + 1], high)
            documents.append(order[i : j + 1])
            counts.append(np.diff(cut, prepend=low))
            if at == start:
                begin = low - (int(ends[i - 1]) if i else 0)
            held.append(kept)
            at = first + high
        return _Items(_joined(documents), _joined(counts), begin, held)


class Window(NamedTuple):
    """Documents shuffled together: places 0, 1, ... and the segments of the epoch they hold."""

    start: int  # the first segment, counted from the epoch's
    documents: Int64Array
    ends: Int64Array  # one more than the last segment of each place
    begins: dict[int, int]  # place -> its first segment inside the document, where not 0
    held: list[Block]

    @property
    def stop(self) -> int:
        """One more than the last segment."""
        return int(self.ends[-1])

    def place(self, segment: int) -> int:
        """Return the place that holds a segment of this window."""
        return int(np.searchsorted(self.ends, segment, side="right"))

    def within(self, place: int, segment: int) -> tuple[int, bool]:
        """Return which segment of its document a place's is, and whether it is the place's first.

        segment: counted from the epoch's first.
        """
        first = int(self.ends[place - 1]) if place else self.start
        return segment - first + self.begins.get(place, 0), segment == first


class Part(NamedTuple):
    """A corpus in the order, and how many of its segments an epoch takes."""

    source: Source
    quota: int


class Order:
    """The documents of every epoch, window by window; safe to ask from several threads."""

    def __init__(
        self, parts: Sequence[Part], *, seed: int, segment_len: int, windows: int | None = None
    ) -> None:
        """windows: of an epoch, cut evenly, but never inside a document; None: no windows at all.

        Without windows everything is shuffled, and all lengths have to be in memory.
        """
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative; use {-seed}")
        if windows is not None and windows < 1:
            raise ValueError(f"windows={windows} must be at least 1")
        self.parts = list(parts)
        self.segment_len = segment_len
        self.segments = sum(part.quota for part in parts)
        self.windows = windows or 1
        self._seed = seed
        alone = len(self.parts) == 1 and windows is None
        self._shuffled = not alone  # else a pass is the epoch already
        self._passes = [
            Passes(
                part.source,
                seed=seed,
                segment_len=segment_len,
                key=None if alone else (number,),
            )
            for number, part in enumerate(self.parts)
        ]
        self._first = np.cumsum([0, *(part.source.documents for part in self.parts)])
        self.documents = int(self._first[-1])
        self._lock = threading.Lock()
        self._edges = lru_cache(maxsize=1024)(self._find_edges)
        self._held: dict[tuple[int, int], Window] = {}
        self._room = 2

    @classmethod
    def whole(cls, lengths: Int64Array, *, seed: int, segment_len: int) -> Order:
        """Return the order that shuffles all documents of these lengths in every epoch."""
        source = Everything(lengths, segment_len)
        part = Part(source, int(source.segments.sum()))
        return cls([part], seed=seed, segment_len=segment_len)

    def hold(self, readers: int) -> None:
        """Keep enough windows for so many readers, each in one of its own."""
        # Two more: one that a reader comes from, one that a reader working ahead goes to.
        if self.windows > 1:
            self._room = max(self._room, readers + 2)

    def length(self, document: int) -> int:
        """Return the tokens of a document."""
        part, within = self.locate(document)
        return self.parts[part].source.length(within)

    def locate(self, document: int) -> tuple[int, int]:
        """Return the part that a document is of, and its number there."""
        if len(self.parts) == 1:
            return 0, document
        part = int(np.searchsorted(self._first, document, side="right")) - 1
        return part, document - int(self._first[part])

    def window(self, epoch: int, segment: int) -> Window:
        """Return the window that holds a segment of an epoch, counted from the epoch's first."""
        assert 0 <= segment < self.segments, (segment, self.segments)
        with self._lock:  # building included: readers of one lane would all build the same
            # Windows begin where a document does, at or before an even share of the epoch.
            number = segment * self.windows // self.segments
            while number + 1 < self.windows and self._start(epoch, number + 1) <= segment:
                number += 1
            window = self._held.pop((epoch, number), None) or self._build(epoch, number)
            self._held[epoch, number] = window  # the last, so the one to be dropped last
            while len(self._held) > self._room:
                del self._held[next(iter(self._held))]
        return window

    def _find_edges(self, epoch: int, number: int) -> tuple[int, ...]:
        """Return where a window begins in each part's passes (number windows: where it ends)."""
        edges = []
        for part, passes in zip(self.parts, self._passes, strict=True):
            begin = epoch * part.quota
            edge = begin + number * part.quota // self.windows
            if 0 < number < self.windows:
                edge = max(begin, passes.document_start(edge))
            edges.append(edge)
        return tuple(edges)

    def _start(self, epoch: int, number: int) -> int:
        return sum(self._edges(epoch, number)) - epoch * self.segments

    def _build(self, epoch: int, number: int) -> Window:
        starts, stops = self._edges(epoch, number), self._edges(epoch, number + 1)
        found: list[tuple[int, _Items]] = [
            (int(first), passes.items(start, stop))
            for first, passes, start, stop in zip(
                self._first[:-1], self._passes, starts, stops, strict=True
            )
            if start < stop
        ]
        documents = _joined(
            [items.documents + first if first else items.documents for first, items in found]
        )
        counts = _joined([items.counts for _, items in found])
        places = np.cumsum([0, *(len(items.counts) for _, items in found)])
        begins = {
            int(place): items.begin
            for place, (_, items) in zip(places, found, strict=False)
            if items.begin
        }
        if self._shuffled:
            order = random_order(len(counts), self._seed, epoch, (_WINDOW, number))
            documents, counts = documents[order], counts[order]
            begins = {int(np.flatnonzero(order == at)[0]): begins[at] for at in begins}
        start = self._start(epoch, number)
        held = [block for _, items in found for block in items.held]
        return Window(start, documents, start + np.cumsum(counts), begins, held)


def _joined(arrays: list[Int64Array]) -> Int64Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
