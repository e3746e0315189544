"""One corpus read pass after pass, each in an order of its own.

Pass k has the blocks of the corpus in one order and the documents of each block in another. A
block is a shard, or everything in one. Any place of any pass is found without those before it, and
needs the lengths of one block only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]

# What is shuffled, in the keys of the random streams: none of them shares one with another.
DOCUMENTS, BLOCKS, WINDOW = 1, 2, 3


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


class Items(NamedTuple):
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
        key = (BLOCKS, *(self._key or ()))
        order = random_order(len(self.source.segments), self._seed, number, key)
        return order, np.cumsum(self.source.segments[order])

    def _shuffle_documents(self, number: int, block: int) -> tuple[Block, Int64Array, Int64Array]:
        """Return a block, its documents in the order of a pass, and the segments up to each end."""
        held = self.source.block(block)
        key = () if self._key is None else (DOCUMENTS, *self._key, block)
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

    def items(self, start: int, stop: int) -> Items:
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
        return Items(joined(documents), joined(counts), begin, held)


def joined(arrays: list[Int64Array]) -> Int64Array:
    """Return arrays one after the other; one alone is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
