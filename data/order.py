"""Which documents an epoch holds, and in what order: of one corpus or a mixture, bounded in memory.

An epoch takes the same number of segments of each corpus, its quota, and goes on where the epoch
before stopped. It is cut into windows, and the documents of a window are shuffled together. So any
window of any epoch is a pure function of the seed, and needs the lengths of its own blocks only.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.passes import (
    WINDOW,
    Block,
    Everything,
    Int64Array,
    Items,
    Passes,
    Source,
    joined,
    random_order,
)


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
        return int(self.ends.searchsorted(segment, side="right"))

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
        found: list[tuple[int, Items]] = [
            (int(first), passes.items(start, stop))
            for first, passes, start, stop in zip(
                self._first[:-1], self._passes, starts, stops, strict=True
            )
            if start < stop
        ]
        documents = joined(
            [items.documents + first if first else items.documents for first, items in found]
        )
        counts = joined([items.counts for _, items in found])
        places = np.cumsum([0, *(len(items.counts) for _, items in found)])
        begins = {
            int(place): items.begin
            for place, (_, items) in zip(places, found, strict=False)
            if items.begin
        }
        if self._shuffled:
            order = random_order(len(counts), self._seed, epoch, (WINDOW, number))
            documents, counts = documents[order], counts[order]
            begins = {int(np.flatnonzero(order == at)[0]): begins[at] for at in begins}
        start = self._start(epoch, number)
        ends = np.cumsum(counts)
        ends += start
        held = [block for _, items in found for block in items.held]
        return Window(start, documents, ends, begins, held)
