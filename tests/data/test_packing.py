"""Packed streams: nothing cut, nothing lost, nothing twice, in an order of the position alone."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import packing
from data.index import Corpus
from data.loader import assemble, load
from data.mixture import Component, Mixture, plan
from data.packing import PackedStreams, pack
from data.streams import IGNORE, Batch, Run, Segment, Streams
from tests.data.corpora import END, open_numbers, write_numbers
from tests.data.test_damage import flip_bit

shapes = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 24), min_size=1, max_size=30),
        "seed": st.integers(0, 2**32),
        "lanes": st.integers(1, 5),
        "segment_len": st.integers(1, 12),
        "segments": st.integers(1, 4),
    }
)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's corpus has several groups of neighbours, read in several passes."""
    monkeypatch.setattr(packing, "NEIGHBOURS", 7)
    monkeypatch.setattr(packing, "_OPEN", 3)
    monkeypatch.setattr(packing, "_WINDOWS", 2)


def build(shape: dict[str, Any], kind: type[Streams] = PackedStreams) -> Streams:
    return kind(np.array(shape["lengths"]), **{k: shape[k] for k in shape if k != "lengths"})


def epoch_of(streams: Streams, epoch: int) -> list[list[Segment | None]]:
    """Return, for each lane, all its segments of the epoch."""
    lanes: list[list[Segment | None]] = [[] for _ in range(streams.lanes)]
    first = epoch * streams.steps_per_epoch
    for step in range(first, first + streams.steps_per_epoch):
        for lane in range(streams.lanes):
            lanes[lane] += streams.sample(step * streams.lanes + lane)
    return lanes


def runs_of(segment: Segment) -> list[Run]:
    return [Run(segment.document, segment.start, segment.stop), *segment.behind]


def packed_by_hand(lengths: list[int], size: int) -> list[list[int]]:
    """The slow twin: one document after the other, into lists."""
    packs: list[list[int]] = []
    for begin in range(0, len(lengths), 7):
        segments: list[list[Any]] = [[0, None]] * 3  # room, pack: those that are open
        for document in range(begin, min(begin + 7, len(lengths))):
            length = lengths[document]
            fitting = [segment for segment in segments if segment[0] >= length]
            if fitting:
                best = min(fitting, key=lambda segment: segment[0])
                best[0] -= length
                best[1].append(document)
                continue
            packs.append([document])
            fullest = min(range(3), key=lambda i: segments[i][0])
            segments[fullest] = [-length % size, packs[-1]]
    return packs


@given(shapes)
@settings(max_examples=200, deadline=None)
def test_packs_are_the_best_fit_among_neighbours(shape: dict[str, Any]) -> None:
    packs = pack(np.array(shape["lengths"]), shape["segment_len"])
    found = [[int(first), *packs.others(i).tolist()] for i, first in enumerate(packs.first)]
    assert found == packed_by_hand(shape["lengths"], shape["segment_len"])


@given(shapes, st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_every_token_is_read_exactly_once_an_epoch(shape: dict[str, Any], epoch: int) -> None:
    read: Counter[tuple[int, int]] = Counter()
    for lane in epoch_of(build(shape), epoch):
        for segment in filter(None, lane):
            for run in runs_of(segment):
                read.update((run.document, i) for i in range(run.start, run.stop))
    assert read == Counter((d, i) for d, n in enumerate(shape["lengths"]) for i in range(n))


@given(shapes)
@settings(max_examples=100, deadline=None)
def test_no_document_is_cut_that_fits_in_a_segment(shape: dict[str, Any]) -> None:
    for lane in epoch_of(build(shape), 0):
        for segment in filter(None, lane):
            runs = runs_of(segment)
            assert sum(run.stop - run.start for run in runs) <= shape["segment_len"]
            for run in runs:
                length = shape["lengths"][run.document]
                assert length > shape["segment_len"] or (run.start, run.stop) == (0, length)
            assert all(shape["lengths"][run.document] == run.stop for run in segment.behind)


@given(shapes)
@settings(max_examples=100, deadline=None)
def test_a_segment_of_several_documents_is_the_last_that_memory_carries_on(
    shape: dict[str, Any],
) -> None:
    for lane in epoch_of(build(shape), 0):
        for before, segment in zip([None, *lane], lane, strict=False):
            if segment and not segment.starts:
                assert before and not before.behind
                assert (before.document, before.stop) == (segment.document, segment.start)
            if segment and segment.behind:
                assert segment.stop == shape["lengths"][segment.document]


@given(shapes, st.lists(st.integers(0, 400), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_sample_depends_on_its_position_alone(
    shape: dict[str, Any], positions: list[int]
) -> None:
    asked_together = build(shape)
    together = [asked_together.sample(position) for position in positions]
    assert together == [build(shape).sample(position) for position in positions]


@given(shapes)
@settings(max_examples=100, deadline=None)
def test_packing_never_needs_more_segments(shape: dict[str, Any]) -> None:
    assert build(shape).total_segments <= build(shape, Streams).total_segments


@given(shapes, st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_keys_per_token_are_those_counted_one_by_one(shape: dict[str, Any], window: int) -> None:
    size, keys, streams = shape["segment_len"], 0, build(shape)
    assert isinstance(streams, PackedStreams)
    for length in shape["lengths"]:
        for place in range(length):
            number, within = divmod(place, size)
            keys += within + 1 + size * min(number, window)
    mean = keys / (streams.total_segments * size)
    assert streams.keys_per_token(window) == pytest.approx(mean, rel=1e-12)


def test_short_documents_fill_segments() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 7 * 40)
    shape = {"lengths": lengths, "seed": 0, "lanes": 1, "segment_len": 2048, "segments": 1}
    used = int(lengths.sum()) / (build(shape).total_segments * 2048)
    assert used > 3 * int(lengths.sum()) / (build(shape, Streams).total_segments * 2048)


def test_epochs_permute_the_packs() -> None:
    streams = build({"lengths": [3] * 90, "seed": 0, "lanes": 1, "segment_len": 8, "segments": 90})
    first, second = ([run for s in streams.sample(i) if s for run in runs_of(s)] for i in (0, 1))
    assert first != second and sorted(first) == sorted(second)


def test_a_mixture_reads_each_corpus_as_packed_by_itself(tmp_path: Path) -> None:
    lengths = ([4, 3, 9, 5, 2, 21, 6], [7, 1, 30, 2, 2, 8, 8, 3])
    corpora = [open_numbers(tmp_path / str(i), part) for i, part in enumerate(lengths)]
    mixture = Mixture([Component(str(i), corpus, 1.0) for i, corpus in enumerate(corpora)])
    order, _ = plan(mixture, None, seed=3, segment_len=10, shuffle_shards=None, packing=True)
    streams = PackedStreams.over(order, lanes=2, segments=2)
    read: Counter[tuple[int, int]] = Counter()
    epochs = 6
    for position in range(epochs * streams.steps_per_epoch * 2):
        for segment in filter(None, streams.sample(position)):
            for run in runs_of(segment):
                assert run.stop <= mixture.length(run.document)
                read.update((run.document, i) for i in range(run.start, run.stop))
    total = sum(sum(part) for part in lengths)
    assert len(read) == total == sum(map(mixture.length, range(mixture.documents)))
    # The corpus that ends the epoch is read once in each, the other by its share.
    assert max(read.values()) == epochs
    for segment in filter(None, (s for p in range(8) for s in streams.sample(p))):
        corpus = mixture._find(segment.document)[0]
        assert all(mixture._find(run.document)[0] is corpus for run in segment.behind)


LENGTHS = [17, 1, 40, 3, 9, 26, 2, 33, 12, 8, 51, 5, 7, 7, 1, 1, 14]


def read(
    corpus: Corpus, dp_size: int = 1, workers: int = 0, position: int = 0, steps: int = 6
) -> list[Batch]:
    """Return the batches of all ranks, one row each, in the order of their positions."""
    streams = PackedStreams(corpus.lengths, seed=5, lanes=6, segment_len=10, segments=2)
    ranks = [
        load(
            corpus,
            streams,
            position=position,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch=1,
            workers=workers,
            steps=steps,
        )
        for rank in range(dp_size)
    ]
    return [batch for step in zip(*ranks, strict=True) for batches in step for batch in batches]


@pytest.mark.parametrize(("dp_size", "workers"), [(1, 2), (2, 0), (3, 1), (6, 2)])
def test_ranks_and_workers_do_not_change_what_is_read(
    tmp_path: Path, dp_size: int, workers: int
) -> None:
    corpus = open_numbers(tmp_path, LENGTHS)
    expected, found = read(corpus), read(corpus, dp_size, workers)
    later = read(corpus, dp_size, workers, position=12, steps=4)
    for before, batch in zip(expected + expected[12:], found + later, strict=True):
        assert before.first_position == batch.first_position
        for name in ("tokens", "labels", "starts", "offsets", "documents"):
            assert torch.equal(getattr(before, name), getattr(batch, name)), name


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    segment_len=st.integers(1, 12),
    segments=st.integers(1, 4),
    lanes=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_batches_hold_each_pair_of_neighbours_once_and_name_each_tokens_document(
    lengths: list[int], segment_len: int, segments: int, lanes: int
) -> None:
    with TemporaryDirectory() as folder:
        corpus = open_numbers(Path(folder), lengths)
        streams = PackedStreams(
            corpus.lengths, seed=1, lanes=lanes, segment_len=segment_len, segments=segments
        )
        texts = [corpus.read(d, 0, n).tolist() for d, n in enumerate(lengths)]
        where = {token: d for d, text in enumerate(texts) for token in text if token != END}
        pairs: Counter[tuple[int, int]] = Counter()
        for (batch,) in load(
            corpus, streams, position=0, dp_rank=0, dp_size=1, micro_batch=lanes, workers=0,
            steps=streams.steps_per_epoch,
        ):  # fmt: skip
            target = batch.labels != IGNORE
            pairs.update(
                zip(batch.tokens[target].tolist(), batch.labels[target].tolist(), strict=True)
            )
            assert batch.documents is not None
            for tokens, documents in zip(
                batch.tokens.flatten(0, 1), batch.documents.flatten(0, 1), strict=True
            ):
                assert documents[0] == 0 and not (documents.diff() < 0).any()
                named = {
                    (number, where[token])
                    for number, token in zip(documents.tolist(), tokens.tolist(), strict=True)
                    if token != END
                }
                assert len({n for n, _ in named}) == len({d for _, d in named}) == len(named)
        assert pairs == Counter(pair for text in texts for pair in pairwise(text))


def test_a_damaged_document_keeps_its_place_among_those_it_is_packed_with(tmp_path: Path) -> None:
    write_numbers(tmp_path, [4, 3, 5, 2])
    flip_bit(tmp_path, 0, 2)
    corpus = Corpus.open(tmp_path, on_damage="skip")
    streams = PackedStreams(corpus.lengths, seed=0, lanes=1, segment_len=16, segments=1)
    batch = assemble(corpus, streams, 0, 1)
    assert len(corpus.damage) == 1 and batch.documents is not None
    tokens = [1, 2, 3, END, 4, 5, END, *[END] * 5, 10, END, END, END]
    assert batch.tokens.flatten().tolist() == tokens
    assert batch.labels.flatten()[7:12].tolist() == [IGNORE] * 5
    assert batch.documents.flatten().tolist() == [0] * 4 + [1] * 3 + [2] * 5 + [3] * 4
