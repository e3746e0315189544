from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.streams import Segment, Streams

shapes = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 40), min_size=1, max_size=30),
        "seed": st.integers(0, 2**32),
        "lanes": st.integers(1, 7),
        "segment_len": st.integers(1, 9),
        "segments": st.integers(1, 4),
    }
)


def build(shape: dict) -> Streams:
    return Streams(np.array(shape["lengths"]), **{k: shape[k] for k in shape if k != "lengths"})


def epoch_of(streams: Streams, epoch: int) -> list[list[Segment | None]]:
    """Return, for each lane, all its segments of the epoch."""
    lanes: list[list[Segment | None]] = [[] for _ in range(streams.lanes)]
    first = epoch * streams.steps_per_epoch
    for step in range(first, first + streams.steps_per_epoch):
        for lane in range(streams.lanes):
            lanes[lane] += streams.sample(step * streams.lanes + lane)
    return lanes


def listed_by_hand(shape: dict, epoch: int) -> list[list[Segment | None]]:
    """The slow twin: the contract's words, one list after the other."""
    lengths, size, lanes = shape["lengths"], shape["segment_len"], shape["lanes"]
    keys = np.random.PCG64(np.random.SeedSequence((shape["seed"], epoch)))
    drawn = [int(key) for key in keys.random_raw(len(lengths))]
    segments = []
    for document in sorted(range(len(lengths)), key=lambda d: (drawn[d], d)):
        for start in range(0, lengths[document], size):
            stop = min(start + size, lengths[document])
            segments.append(Segment(document, start, stop, start == 0))
    total = len(segments)
    shares = [segments[n * total // lanes : (n + 1) * total // lanes] for n in range(lanes)]
    longest = max(len(share) for share in shares)
    padded = -(-longest // shape["segments"]) * shape["segments"]
    result: list[list[Segment | None]] = []
    for share in shares:
        first = [share[0]._replace(starts=True)] if share else []
        result.append([*first, *share[1:], *[None] * (padded - len(share))])
    return result


@given(shapes, st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_the_order_is_the_one_of_the_contract(shape: dict, epoch: int) -> None:
    assert epoch_of(build(shape), epoch) == listed_by_hand(shape, epoch)


@given(shapes, st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_every_token_is_read_exactly_once_an_epoch(shape: dict, epoch: int) -> None:
    read: Counter[tuple[int, int]] = Counter()
    for lane in epoch_of(build(shape), epoch):
        for segment in filter(None, lane):
            read.update((segment.document, i) for i in range(segment.start, segment.stop))
    assert read == Counter((d, i) for d, n in enumerate(shape["lengths"]) for i in range(n))


@given(shapes, st.lists(st.integers(0, 400), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_sample_depends_on_its_position_alone(shape: dict, positions: list[int]) -> None:
    asked_together = build(shape)
    together = [asked_together.sample(position) for position in positions]
    assert together == [build(shape).sample(position) for position in positions]


@given(shapes)
@settings(max_examples=100, deadline=None)
def test_a_segment_that_does_not_start_continues_the_one_before(shape: dict) -> None:
    for lane in epoch_of(build(shape), 0):
        for before, segment in zip([None, *lane], lane, strict=False):
            if segment and not segment.starts:
                assert before and (before.document, before.stop) == (
                    segment.document,
                    segment.start,
                )


@given(shapes)
@settings(max_examples=100, deadline=None)
def test_the_last_step_of_an_epoch_is_not_empty(shape: dict) -> None:
    streams = build(shape)
    last = (streams.steps_per_epoch - 1) * streams.lanes
    assert any(any(streams.sample(last + lane)) for lane in range(streams.lanes))


def test_every_epoch_begins_with_a_reset_in_every_lane() -> None:
    streams = Streams(np.array([1000]), seed=0, lanes=3, segment_len=7, segments=2)
    for epoch in range(3):
        for lane in range(3):
            first = streams.sample(epoch * streams.steps_per_epoch * 3 + lane)[0]
            assert first is not None and first.starts


def test_epochs_have_different_orders() -> None:
    streams = Streams(np.full(50, 4), seed=0, lanes=1, segment_len=4, segments=50)
    assert sorted(streams.sample(0)) == sorted(streams.sample(1))
    assert streams.sample(0) != streams.sample(1)


def test_seeds_have_different_orders() -> None:
    def order(seed: int) -> list[Segment | None]:
        return Streams(np.full(50, 4), seed=seed, lanes=1, segment_len=4, segments=50).sample(0)

    assert order(0) != order(1)


def test_the_order_of_seed_7_is_the_same_on_every_machine_and_version() -> None:
    streams = Streams(np.full(8, 2), seed=7, lanes=1, segment_len=2, segments=8)
    orders = [[s.document for s in streams.sample(epoch) if s] for epoch in range(2)]
    assert orders == [[6, 3, 4, 0, 2, 7, 5, 1], [1, 3, 2, 7, 4, 5, 0, 6]]


def test_more_lanes_than_segments_leaves_lanes_empty() -> None:
    streams = Streams(np.array([3, 3]), seed=0, lanes=5, segment_len=4, segments=1)
    found = [streams.sample(lane)[0] for lane in range(5)]
    assert sorted(s.document for s in found if s) == [0, 1] and found.count(None) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 0}, "lanes=0 must be at least 1"),
        ({"segment_len": 0}, "segment_len=0 must be at least 1"),
        ({"segments": -1}, "segments=-1 must be at least 1"),
        ({"seed": -3}, "seed=-3 must not be negative"),
        ({"lengths": np.array([], dtype=np.int64)}, "0 documents"),
        ({"lengths": np.array([4, 0, 4])}, "document 1 has 0 tokens"),
    ],
)
def test_impossible_shapes_are_refused(change: dict, message: str) -> None:
    shape = {"lengths": np.array([4]), "seed": 0, "lanes": 1, "segment_len": 2, "segments": 1}
    with pytest.raises(ValueError, match=message):
        Streams(**{**shape, **change})


def test_a_negative_position_is_refused() -> None:
    streams = Streams(np.array([4]), seed=0, lanes=1, segment_len=2, segments=1)
    with pytest.raises(ValueError, match="position=-1 must not be negative"):
        streams.sample(-1)
