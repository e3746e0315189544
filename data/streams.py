"""Which tokens a sample holds: pure arithmetic over document lengths, no files.

Epoch e permutes the documents. Each is cut into segments; all segments in that order form
one list; each of the B lanes takes its contiguous share of it and walks through it, N
segments a step. So a lane reads whole documents one after the other, a memory has a past to
carry, and a sample is a pure function of (seed, epoch, position) whatever reads it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

# torch's cross entropy leaves this label out by default.
IGNORE = -100

Int64Array = NDArray[np.int64]


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


class Streams:
    """The order of a run: `sample(position)` for every position from 0 on.

    Step t of lane l is position t * lanes + l. Every token of every document is read once an
    epoch; a share that ends before the epoch does is filled up with None.
    """

    packs = False  # whether segments may hold several documents

    def __init__(
        self, lengths: Int64Array, *, seed: int, lanes: int, segment_len: int, segments: int
    ) -> None:
        for name, value in (
            ("lanes", lanes),
            ("segment_len", segment_len),
            ("segments", segments),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative; use {-seed}")
        if len(lengths) == 0:
            raise ValueError("the corpus holds 0 documents; prepare one with at least 1")
        if int(lengths.min()) < 1:
            raise ValueError(
                f"document {int(lengths.argmin())} has {int(lengths.min())} tokens; each needs"
                f" at least 1 (its end-of-document token): prepare the corpus again"
            )
        self.lanes = lanes
        self.segment_len = segment_len
        self.segments = segments
        self._seed = seed
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self._counts = -(-self.lengths // segment_len)
        self.total_segments = int(self._counts.sum())
        longest_share = -(-self.total_segments // lanes)
        self.steps_per_epoch = -(-longest_share // segments)
        # Two epochs: readers that work ahead cross an epoch's end before the last one does.
        self._epoch = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        # Sorted raw PCG64 output, not Generator.permutation: numpy promises the bit streams
        # of its generators for ever, but not what Generator makes of them (NEP 19).
        source = np.random.PCG64(np.random.SeedSequence((self._seed, epoch)))
        order = np.argsort(source.random_raw(len(self.lengths)), kind="stable")
        return order.astype(np.int64, copy=False), np.cumsum(self._counts[order])

    def sample(self, position: int) -> list[Segment | None]:
        """Return the N segments of this sample; None is an empty (padding) segment."""
        if position < 0:
            raise ValueError(f"position={position} must not be negative; a run starts at 0")
        step, lane = divmod(position, self.lanes)
        epoch, step = divmod(step, self.steps_per_epoch)
        begin = lane * self.total_segments // self.lanes
        end = (lane + 1) * self.total_segments // self.lanes
        first = begin + step * self.segments
        order, ends = self._epoch(epoch)
        found: list[Segment | None] = []
        place = int(np.searchsorted(ends, first, side="right"))
        for index in range(first, first + self.segments):
            if index >= end:
                found.append(None)
                continue
            while ends[place] <= index:
                place += 1
            document = int(order[place])
            within = index - int(ends[place]) + int(self._counts[document])
            start = within * self.segment_len
            stop = min(start + self.segment_len, int(self.lengths[document]))
            found.append(Segment(document, start, stop, within == 0 or index == begin))
        return found
