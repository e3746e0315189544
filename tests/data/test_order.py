"""Windows, passes and quotas: nothing lost, nothing starved, the same wherever one begins."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Order, Part
from data.passes import Everything, count_segments
from data.streams import Segment, Streams

SEGMENT_LEN = 4


class Blocks:
    """A corpus whose documents lie in blocks."""

    def __init__(self, blocks: list[list[int]]) -> None:
        self.lists = [np.array(lengths) for lengths in blocks]
        self.documents = sum(map(len, blocks))
        self.segments = np.array([count_segments(x, SEGMENT_LEN).sum() for x in self.lists])
        self.firsts = np.cumsum([0, *map(len, blocks)])
        self.asked: list[int] = []

    def first(self, block: int) -> int:
        return int(self.firsts[block])

    def block(self, block: int) -> Any:
        self.asked.append(block)
        return type("Table", (), {"lengths": self.lists[block]})()

    def length(self, document: int) -> int:
        return int(np.concatenate(self.lists)[document])


def whole(blocks: list[list[int]]) -> Everything:
    return Everything(np.concatenate([np.array(x) for x in blocks]), SEGMENT_LEN)


corpora = st.lists(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=6),
    min_size=1,
    max_size=3,
)
shapes = st.fixed_dictionaries(
    {
        "corpora": corpora,
        "quotas": st.lists(st.integers(1, 60), min_size=3, max_size=3),
        "windows": st.none() | st.integers(1, 9),
        "seed": st.integers(0, 2**40),
        "lanes": st.integers(1, 6),
        "segments": st.integers(1, 4),
    }
)


def order_of(shape: dict[str, Any]) -> Order:
    opened = Blocks if shape["windows"] else whole
    parts = [
        Part(opened(blocks), quota)
        for blocks, quota in zip(shape["corpora"], shape["quotas"], strict=False)
    ]
    return Order(parts, seed=shape["seed"], segment_len=SEGMENT_LEN, windows=shape["windows"])


def build(shape: dict[str, Any]) -> Streams:
    return Streams.over(order_of(shape), lanes=shape["lanes"], segments=shape["segments"])


def lanes_of(streams: Streams, epoch: int) -> list[list[Segment | None]]:
    """Return, for each lane, all its segments of the epoch."""
    first = epoch * streams.steps_per_epoch
    return [
        [
            segment
            for step in range(first, first + streams.steps_per_epoch)
            for segment in streams.sample(step * streams.lanes + lane)
        ]
        for lane in range(streams.lanes)
    ]


def read_in(streams: Streams, epoch: int) -> Counter[tuple[int, int]]:
    """Return how often each segment, as (document, its first token), is read in an epoch."""
    return Counter(
        (segment.document, segment.start)
        for lane in lanes_of(streams, epoch)
        for segment in lane
        if segment
    )


def segments_of(shape: dict[str, Any]) -> list[list[tuple[int, int]]]:
    """Return the segments of each corpus, as (document of the mixture, its first token)."""
    document, found = 0, []
    for blocks in shape["corpora"]:
        segments = []
        for length in (length for block in blocks for length in block):
            segments += [(document, start) for start in range(0, length, SEGMENT_LEN)]
            document += 1
        found.append(segments)
    return found


@given(shapes, st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_an_epoch_takes_its_quota_of_each_corpus_and_spends_every_segment_evenly(
    shape: dict[str, Any], epochs: int
) -> None:
    streams = build(shape)
    read: Counter[tuple[int, int]] = Counter()
    for epoch in range(epochs):
        now = read_in(streams, epoch)
        read += now
        for segments, quota in zip(segments_of(shape), shape["quotas"], strict=False):
            assert sum(now[segment] for segment in segments) == quota
            # Nothing is starved: so far, each was read floor or ceil of the average.
            times = {read[segment] for segment in segments}
            low, rest = divmod((epoch + 1) * quota, len(segments))
            assert times <= ({low, low + 1} if rest else {low})


@given(shapes, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_a_segment_that_does_not_start_continues_the_one_before(
    shape: dict[str, Any], epoch: int
) -> None:
    streams = build(shape)
    for lane in lanes_of(streams, epoch):
        for before, segment in zip([None, *lane], lane, strict=False):
            if segment and not segment.starts:
                expected = (segment.document, segment.start)
                assert before and (before.document, before.stop) == expected
            if segment and segment.start == 0:
                assert segment.starts


@given(shapes)
@settings(max_examples=150, deadline=None)
def test_windows_cut_no_document(shape: dict[str, Any]) -> None:
    """Only a lane's begin and an epoch's, where a quota stops in a document, are no document's."""
    shape["lanes"] = 1
    streams = build(shape)
    cut = sum(
        1 for segment in lanes_of(streams, 1)[0] if segment and segment.starts and segment.start
    )
    assert cut <= len(shape["corpora"])


@given(shapes, st.lists(st.integers(0, 300), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_a_sample_depends_on_its_position_alone(
    shape: dict[str, Any], positions: list[int]
) -> None:
    asked_together = build(shape)
    together = [asked_together.sample(position) for position in positions]
    assert together == [build(shape).sample(position) for position in positions]


def one_corpus(blocks: int, each: int, windows: int | None, **changes: int) -> Streams:
    shape: dict[str, Any] = {
        "corpora": [[[SEGMENT_LEN] * each] * blocks],
        "quotas": [blocks * each],
        "windows": windows,
        "seed": 7,
        "lanes": 1,
        "segments": 1,
        **changes,
    }
    return build(shape)


def documents_of(streams: Streams, epoch: int) -> list[int]:
    return [s.document for lane in lanes_of(streams, epoch) for s in lane if s]


def test_a_window_shuffles_its_shards_together_and_no_others() -> None:
    streams = one_corpus(blocks=12, each=10, windows=4)
    order = documents_of(streams, 0)
    for first in range(0, 120, 30):
        blocks = [document // 10 for document in order[first : first + 30]]
        assert len(set(blocks)) == 3
        assert len(set(blocks[:10])) > 1  # shards are not read one after the other


def test_every_epoch_has_other_windows() -> None:
    streams = one_corpus(blocks=12, each=10, windows=4)
    windows = [
        {
            frozenset(document // 10 for document in documents_of(streams, epoch)[n : n + 30])
            for n in range(0, 120, 30)
        }
        for epoch in range(2)
    ]
    assert windows[0] != windows[1]
    assert documents_of(streams, 0) != documents_of(streams, 1)


def test_the_order_in_windows_is_the_same_on_every_machine_and_version() -> None:
    streams = one_corpus(blocks=4, each=3, windows=2)
    assert documents_of(streams, 0) == [1, 0, 6, 7, 2, 8, 4, 3, 9, 11, 5, 10]
    assert documents_of(streams, 1) == [2, 9, 0, 1, 10, 11, 3, 5, 4, 7, 6, 8]


def test_the_order_of_a_mixture_is_the_same_on_every_machine_and_version() -> None:
    shape = {"corpora": [[[4] * 6], [[4] * 9]], "quotas": [6, 3], "windows": None, "seed": 7}
    streams = build({**shape, "lanes": 1, "segments": 1})
    assert documents_of(streams, 0) == [9, 3, 4, 0, 10, 6, 1, 2, 5]
    assert documents_of(streams, 1) == [3, 2, 4, 0, 12, 13, 14, 5, 1]


def test_one_corpus_taken_whole_has_the_order_it_has_by_its_lengths() -> None:
    lengths = np.array([17, 1, 40, 3, 9, 26, 2, 33, 12, 8, 51, 5])
    source = Everything(lengths, SEGMENT_LEN)
    order = Order([Part(source, int(source.segments[0]))], seed=5, segment_len=SEGMENT_LEN)
    mixed = Streams.over(order, lanes=3, segments=2)
    plain = Streams(lengths, seed=5, lanes=3, segment_len=SEGMENT_LEN, segments=2)
    assert [mixed.sample(n) for n in range(200)] == [plain.sample(n) for n in range(200)]


def test_a_sample_far_away_reads_the_blocks_of_its_windows_only() -> None:
    streams = one_corpus(blocks=100, each=10, windows=50, lanes=2)
    source: Any = streams.order.parts[0].source
    streams.sample(1_000_000)
    assert len(set(source.asked)) <= 2 + 2  # a window's shards, and those its edges lie in


def test_windows_held_do_not_grow_with_what_was_read() -> None:
    streams = one_corpus(blocks=100, each=10, windows=50, lanes=4)
    for position in range(4 * streams.steps_per_epoch):
        streams.sample(position)
    assert len(streams.order._held) <= 4 + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -3}, "seed=-3 must not be negative"),
        ({"windows": -1}, "windows=-1 must be at least 1"),
        ({"lanes": 0}, "lanes=0 must be at least 1"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_corpus(**{"blocks": 2, "each": 2, "windows": 2, **change})
