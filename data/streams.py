"""Which tokens a sample holds: pure arithmetic over document lengths, no files.

Epoch e has the documents in an order of its own (`data.order`). Each is cut into segments; all
segments in that order form one list; each of the B lanes takes its contiguous share of it and
walks through it, N segments a step. So a lane reads whole documents one after the other, a memory
has a past to carry, and a sample is a pure function of (seed, epoch, position) whatever reads it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from data.order import Order
from data.passes import Int64Array

if TYPE_CHECKING:
    from torch import Tensor

# torch's cross entropy leaves this label out by default.
IGNORE = -100


class Batch(NamedTuple):
    """B consecutive samples of N segments of S tokens each (torch, CPU).

    tokens: [B, N, S] int64, padded with end-of-document tokens.
    labels: [B, N, S] int64, the next token of the same document, IGNORE where there is none.
    starts: [B, N] bool, the memory resets before this segment: it is the first of a
        document, or the first of a lane's share of the epoch, or it is padding.
    offsets: [B, N] int64, the index inside its document of the segment's first token.
    first_position: the sample number of row 0; row i is sample first_position + i.
    documents: [B, N, S] int64, where segments are packed: which document of its segment a
        token is of, 0 for the first; padding counts as the last one's. None: not packed.
    """

    tokens: Tensor
    labels: Tensor
    starts: Tensor
    offsets: Tensor
    first_position: int
    documents: Tensor | None = None


class Run(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


class Segment(NamedTuple):
    """Tokens [start, stop) of a document; `starts` where the memory resets before it.

    behind: whole documents in the same segment after it, where segments are packed.
    """

    document: int
    start: int
    stop: int
    starts: bool
    behind: tuple[Run, ...] = ()


class Stretch(NamedTuple):
    """Segments first, first + 1, ... of a sample: tokens [start, stop) of one document.

    All are full but the last one of a document. starts: the memory resets before the first.
    behind: whole documents in the last segment after it, where segments are packed.
    """

    first: int
    segments: int
    document: int
    start: int
    stop: int
    starts: bool
    behind: tuple[Run, ...] = ()


class Streams:
    """The order of a run: `sample(position)` for every position from 0 on.

    Step t of lane l is position t * lanes + l. Every token of an epoch's documents is read once
    in it; a share that ends before the epoch does is filled up with None.
    """

    packs = False  # whether segments may hold several documents

    def __init__(
        self, lengths: Int64Array, *, seed: int, lanes: int, segment_len: int, segments: int
    ) -> None:
        if segment_len < 1:
            raise ValueError(f"segment_len={segment_len} must be at least 1")
        order = Order.whole(lengths, seed=seed, segment_len=segment_len)
        self._begin(order, lanes, segments, longest=int(lengths.max()))

    @classmethod
    def over(cls, order: Order, *, lanes: int, segments: int) -> Streams:
        """Return the streams of an order: of a mixture, or of a corpus in windows."""
        streams = cls.__new__(cls)
        streams._begin(order, lanes, segments, longest=None)
        return streams

    def _begin(self, order: Order, lanes: int, segments: int, *, longest: int | None) -> None:
        for name, value in (("lanes", lanes), ("segments", segments)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.order, self.lanes, self.segments = order, lanes, segments
        self.segment_len = order.segment_len
        self.documents = order.documents
        self.total_segments = order.segments
        longest_share = -(-self.total_segments // lanes)
        self.steps_per_epoch = -(-longest_share // segments)
        self.longest = longest  # tokens of the longest document, where that is known
        self._read_lanes: set[int] = set()

    def stretches(self, position: int) -> list[Stretch]:
        """Return what this sample holds, in order from its first segment on; the rest is padding.

        A stretch for each document of it: long documents cost no more than short ones.
        """
        if position < 0:
            raise ValueError(f"position={position} must not be negative; a run starts at 0")
        step, lane = divmod(position, self.lanes)
        epoch, step = divmod(step, self.steps_per_epoch)
        begin = lane * self.total_segments // self.lanes
        end = (lane + 1) * self.total_segments // self.lanes
        first = begin + step * self.segments
        if lane not in self._read_lanes:
            self._read_lanes.add(lane)
            self.order.hold(len(self._read_lanes))
        found: list[Stretch] = []
        window, place = None, 0
        index, after = first, min(first + self.segments, end)
        while index < after:
            if window is None or index >= window.stop:
                window = self.order.window(epoch, index)
                place = window.place(index)
            while window.ends[place] <= index:  # a document may have no segment of its own
                place += 1
            document = int(window.documents[place])
            within, is_first = window.within(place, index)
            count = min(int(window.ends[place]), after) - index
            start = within * self.segment_len
            stop = min(start + count * self.segment_len, self.order.length(document))
            starts = is_first or index == begin
            found.append(Stretch(index - first, count, document, start, stop, starts))
            index += count
        return found

    def sample(self, position: int) -> list[Segment | None]:
        """Return the N segments of this sample; None is an empty (padding) segment."""
        found: list[Segment | None] = []
        for stretch in self.stretches(position):
            ends = range(stretch.start + self.segment_len, stretch.stop, self.segment_len)
            cuts = [stretch.start, *ends, stretch.stop]
            for start, stop in pairwise(cuts):
                starts = stretch.starts and start == stretch.start
                behind = stretch.behind if stop == stretch.stop else ()
                found.append(Segment(stretch.document, start, stop, starts, behind))
        return found + [None] * (self.segments - len(found))
