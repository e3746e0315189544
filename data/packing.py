"""Packs: short documents side by side in a segment, instead of a segment and padding for each.

A pack is a document and those that lie behind it in its last segment. Only whole documents are put
there, and only where they fit: so a document longer than a segment still begins at a segment's
start and is carried on by the memory, one that begins inside a segment ends inside it, and a
segment of several documents is the last of the one it began with. Attention keeps them apart
(model.packed), so it means nothing to a document which others it shares a segment with.

Hence packs need no randomness of their own: they are made once, of the corpus's order. A run's
order is that of the documents that packs begin with; those behind have no segment of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.order import Order, Part
from data.passes import Everything, Int64Array, count_segments
from data.streams import Run, Streams, Stretch

NEIGHBOURS = 1024
"""Documents that are packed with one another: few, so that a pack is read from one or two shards.

Documents of 800 tokens in segments of 4096: 5 % are padding with 64 neighbours, 0.8 % with 1024,
0.5 % with 4096.
"""
_OPEN = 32
"""Segments with room that a document chooses among; a new one takes the place of the fullest."""
_WINDOWS = 4096
"""Groups of neighbours that are packed in the same pass of numpy; bounds what it holds."""


class Packs(NamedTuple):
    """The documents of each pack."""

    first: Int64Array  # [packs], rising
    behind: Int64Array  # all other documents, pack after pack, rising in each
    ends: Int64Array  # [packs]: how many of `behind` belong to packs up to this one

    def others(self, pack: int) -> Int64Array:
        """Return the documents in the last segment of a pack, behind its first document."""
        begin = int(self.ends[pack - 1]) if pack else 0
        return self.behind[begin : int(self.ends[pack])]


def pack(lengths: Int64Array, segment_len: int) -> Packs:
    """Return the packs of documents of these lengths: best fit among the open segments.

    Each document goes into the fullest open segment of its group of neighbours that has room for
    it whole, else it begins a pack. A function of the arguments alone.
    """
    first_of = np.empty(len(lengths), dtype=np.int64)
    some = NEIGHBOURS * _WINDOWS
    for begin in range(0, len(lengths), some):
        first_of[begin : begin + some] = begin + _pack_some(
            lengths[begin : begin + some], segment_len
        )
    numbers = np.arange(len(lengths))
    first = numbers[first_of == numbers]
    behind = numbers[first_of != numbers]
    behind = behind[np.argsort(first_of[behind], kind="stable")]
    return Packs(first, behind, np.searchsorted(first_of[behind], first, side="right"))


def _pack_some(lengths: Int64Array, segment_len: int) -> Int64Array:
    """Return the first document of each one's pack: groups of NEIGHBOURS side by side."""
    groups = -(-len(lengths) // NEIGHBOURS)
    padded = np.zeros(groups * NEIGHBOURS, dtype=np.int64)
    padded[: len(lengths)] = lengths
    length = padded.reshape(groups, NEIGHBOURS)
    number = np.arange(groups * NEIGHBOURS).reshape(groups, NEIGHBOURS)
    first_of = number.copy()
    room = np.zeros((groups, _OPEN), dtype=np.int64)
    owner = np.zeros((groups, _OPEN), dtype=np.int64)
    every = np.arange(groups)
    for i in range(min(NEIGHBOURS, len(lengths))):
        asked = length[:, i]
        left = room - asked[:, None]
        slot = np.where(left >= 0, left, segment_len).argmin(1)
        fits = left[every, slot] >= 0
        first_of[fits, i] = owner[every, slot][fits]
        # Else it opens a segment, in the place of the fullest: what its own last one has left.
        slot = np.where(fits, slot, room.argmin(1))
        tail = (asked - 1) % segment_len + 1
        room[every, slot] = np.where(fits, room[every, slot] - asked, segment_len - tail)
        owner[every, slot] = first_of[:, i]
    return first_of.ravel()[: len(lengths)]


class PackedSource(Everything):
    """A corpus as one block of packs: documents behind others have no tokens of their own in it."""

    def __init__(self, lengths: Int64Array, segment_len: int) -> None:
        super().__init__(lengths, segment_len)
        self.whole, self._segment_len = self.lengths, segment_len
        self._packs = pack(self.whole, segment_len)
        self.lengths = np.zeros_like(self.whole)
        self.lengths[self._packs.first] = self.whole[self._packs.first]
        self.segments = np.array([count_segments(self.lengths, segment_len).sum()])

    def length(self, document: int) -> int:
        """Return the tokens of a document, wherever it lies."""
        return int(self.whole[document])

    def behind(self, document: int) -> Int64Array:
        """Return the documents behind one that begins a pack."""
        return self._packs.others(int(np.searchsorted(self._packs.first, document)))

    def keys_per_token(self, window: int) -> float:
        """Return how many keys of its own and `window` earlier segments a token reads on average.

        Over the whole corpus, padding as tokens that read nothing.
        """
        size = self._segment_len
        earlier = count_segments(self.whole, size) - 1  # full segments, before the last one
        tail = self.whole - earlier * size
        own = earlier * (size * (size + 1) // 2) + tail * (tail + 1) // 2
        # The k-th full segment has k before it, of which the window keeps some.
        ramp = np.minimum(earlier, window + 1)
        full = ramp * (ramp - 1) // 2 + (earlier - ramp) * window
        past = full * size * size + tail * size * np.minimum(earlier, window)
        return float((own + past).sum()) / (int(self.segments[0]) * size)


class PackedStreams(Streams):
    """The order of a run over packs: `sample(position)` as of Streams.

    A segment is one of a pack's first document, and, its last one, whole documents behind it.
    """

    packs = True

    def __init__(
        self, lengths: Int64Array, *, seed: int, lanes: int, segment_len: int, segments: int
    ) -> None:
        source = PackedSource(lengths, segment_len)
        part = Part(source, int(source.segments.sum()))
        order = Order([part], seed=seed, segment_len=segment_len)
        self._begin(order, lanes, segments, longest=int(source.whole.max()))

    def stretches(self, position: int) -> list[Stretch]:
        """Return what this sample holds, as `Streams.stretches` does, and what is packed behind."""
        return [self._with_others(stretch) for stretch in super().stretches(position)]

    def _with_others(self, stretch: Stretch) -> Stretch:
        """Return a stretch with the documents behind its own, where that ends in it."""
        part, number = self.order.locate(stretch.document)
        source = self.order.parts[part].source
        assert isinstance(source, PackedSource)
        if stretch.stop < source.length(number):
            return stretch
        first = stretch.document - number  # of the part's documents, in a mixture
        others = source.behind(number)
        behind = zip(others.tolist(), source.whole[others].tolist(), strict=True)
        return stretch._replace(
            behind=tuple(Run(first + other, 0, length) for other, length in behind)
        )

    def keys_per_token(self, window: int) -> float:
        """Return how many keys of its own and `window` earlier segments a token reads on average.

        Over all epochs; see PackedSource.keys_per_token.
        """
        total = 0.0
        for part in self.order.parts:
            assert isinstance(part.source, PackedSource)
            total += part.quota * part.source.keys_per_token(window)
        return total / self.total_segments
