import itertools
import threading
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.index import Corpus
from data.loader import load
from data.streams import IGNORE, Batch, Streams
from tests.data.corpora import END, open_numbers

LENGTHS = [17, 1, 40, 3, 9, 26, 2, 33, 12, 8, 51, 5]
LANES = 6


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return open_numbers(tmp_path / "corpus", LENGTHS)


def streams_of(corpus: Corpus, lanes: int = LANES) -> Streams:
    return Streams(corpus.lengths, seed=5, lanes=lanes, segment_len=4, segments=3)


def rows(batches: list[Batch]) -> list[tuple[int, bytes]]:
    """Return every row as (sample number, all its bytes)."""
    return [
        (batch.first_position + i, b"".join(t[i].numpy().tobytes() for t in batch[:4]))
        for batch in batches
        for i in range(len(batch.tokens))
    ]


def read_steps(
    corpus: Corpus, position: int, steps: int, dp_size: int, workers: int
) -> list[tuple[int, bytes]]:
    """Return the rows of these steps, read by all ranks, step by step."""
    ranks = [
        load(
            corpus,
            streams_of(corpus),
            position=position,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch=1,
            workers=workers,
            steps=steps,
        )
        for rank in range(dp_size)
    ]
    return [row for step in zip(*ranks, strict=True) for batches in step for row in rows(batches)]


def one_rank(corpus: Corpus, **changes: int) -> list[list[Batch]]:
    arguments = {"position": 0, "dp_rank": 0, "dp_size": 1, "micro_batch": 1, "steps": 4}
    return list(load(corpus, streams_of(corpus), **{**arguments, **changes}))


@pytest.mark.parametrize("dp_size", [1, 2, 3, 6])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_dp_size_and_workers_do_not_change_the_order(
    corpus: Corpus, dp_size: int, workers: int
) -> None:
    expected = read_steps(corpus, 0, 9, dp_size=1, workers=0)
    assert [position for position, _ in expected] == list(range(9 * LANES))
    assert read_steps(corpus, 0, 9, dp_size, workers) == expected


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3, 6]), st.integers(0, 3)),
        min_size=4,
        max_size=10,
    )
)
@settings(max_examples=25, deadline=None)
def test_layouts_changed_many_times_in_the_middle_lose_and_repeat_nothing(
    parts: list[tuple[int, int, int]],
) -> None:
    with TemporaryDirectory() as folder:
        corpus = open_numbers(Path(folder), LENGTHS)
        got: list[tuple[int, bytes]] = []
        for steps, dp_size, workers in parts:
            got += read_steps(corpus, len(got), steps, dp_size, workers)
        assert got == read_steps(corpus, 0, len(got) // LANES, dp_size=1, workers=0)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    lanes=st.integers(1, 5),
    segment_len=st.integers(1, 7),
    segments=st.integers(1, 4),
    epoch=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_every_pair_of_neighbours_in_a_document_is_a_target_exactly_once_an_epoch(
    lengths: list[int], lanes: int, segment_len: int, segments: int, epoch: int
) -> None:
    with TemporaryDirectory() as folder:
        corpus = open_numbers(Path(folder), lengths)
        streams = Streams(
            corpus.lengths, seed=1, lanes=lanes, segment_len=segment_len, segments=segments
        )
        steps = streams.steps_per_epoch
        seen: Counter[tuple[int, int]] = Counter()
        for (batch,) in load(
            corpus,
            streams,
            position=epoch * steps * lanes,
            dp_rank=0,
            dp_size=1,
            micro_batch=lanes,
            workers=0,
            steps=steps,
        ):
            target = batch.labels != IGNORE
            pairs = zip(batch.tokens[target].tolist(), batch.labels[target].tolist(), strict=True)
            seen.update(pairs)
        documents = [corpus.read(d, 0, n).tolist() for d, n in enumerate(lengths)]
        assert seen == Counter(pair for d in documents for pair in itertools.pairwise(d))


def test_tokens_lie_at_their_offset_in_their_document(corpus: Corpus) -> None:
    where = {
        token: place
        for document, length in enumerate(LENGTHS)
        for place, token in enumerate(corpus.read(document, 0, length - 1).tolist())
    }
    tokens = [
        (batch.tokens[0, n, i].item(), batch.offsets[0, n].item() + i)
        for batch in itertools.chain(*one_rank(corpus))
        for n in range(3)
        for i in range(4)
    ]
    read = [(token, place) for token, place in tokens if token != END]
    assert len(read) > 100 and all(where[token] == place for token, place in read)


def test_a_lane_that_ran_out_reads_padding(tmp_path: Path) -> None:
    corpus = open_numbers(tmp_path / "short", [4, 4, 4])
    streams = Streams(corpus.lengths, seed=0, lanes=2, segment_len=4, segments=2)
    ((batch,),) = load(corpus, streams, position=0, dp_rank=0, dp_size=1, micro_batch=2, steps=1)
    padding = (batch.tokens[0, 1], batch.labels[0, 1], batch.starts[0, 1], batch.offsets[0, 1])
    assert [part.tolist() for part in padding] == [[END] * 4, [IGNORE] * 4, True, 0]


def test_batches_have_the_dtypes_and_shapes_of_the_contract(corpus: Corpus) -> None:
    (first, second, third), *_ = one_rank(corpus, micro_batch=2)
    assert [batch.first_position for batch in (first, second, third)] == [0, 2, 4]
    assert [(t.dtype, tuple(t.shape)) for t in first[:4]] == [
        (torch.int64, (2, 3, 4)),
        (torch.int64, (2, 3, 4)),
        (torch.bool, (2, 3)),
        (torch.int64, (2, 3)),
    ]


def test_a_rank_reads_its_own_lanes(corpus: Corpus) -> None:
    (batches, *_) = one_rank(corpus, dp_rank=1, dp_size=2, micro_batch=3)
    assert [position for position, _ in rows(batches)] == [3, 4, 5]


def test_the_iterator_goes_on_over_the_end_of_an_epoch(corpus: Corpus) -> None:
    per_epoch = streams_of(corpus).steps_per_epoch
    steps = one_rank(corpus, steps=2 * per_epoch + 1)
    assert rows(steps[-1])[0][0] == 2 * per_epoch * LANES


class Failing(Corpus):
    """Cannot read document 2."""

    def read_stored(self, document: int, start: int, stop: int):  # type: ignore[no-untyped-def]
        if document == 2:
            raise RuntimeError("disk on fire")
        return super().read_stored(document, start, stop)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_workers_exception_arrives_at_its_step(corpus: Corpus, workers: int) -> None:
    streams = streams_of(corpus)
    failing_step = next(
        position // LANES
        for position in itertools.count()
        if any(s and s.document == 2 for s in streams.sample(position))
    )
    failing = Failing.open(corpus.folder)
    position = max(0, failing_step - 1) * LANES
    steps = load(
        failing,
        streams,
        position=position,
        dp_rank=0,
        dp_size=1,
        micro_batch=1,
        workers=workers,
    )
    for _ in range(failing_step - position // LANES):
        next(steps)
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(steps)


def data_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("longhaul-data")]


def test_closing_the_iterator_stops_its_threads(corpus: Corpus) -> None:
    steps = load(
        corpus,
        streams_of(corpus),
        position=0,
        dp_rank=0,
        dp_size=1,
        micro_batch=1,
        workers=2,
    )
    next(steps)
    running = data_threads()
    steps.close()
    assert running and not data_threads()


def test_an_iterator_read_to_its_end_leaves_no_thread(corpus: Corpus) -> None:
    one_rank(corpus, workers=2)
    assert not data_threads()


def test_workers_read_ahead(corpus: Corpus) -> None:
    touched: list[int] = []

    class Counting(Corpus):
        def read_stored(self, document: int, start: int, stop: int):  # type: ignore[no-untyped-def]
            touched.append(document)
            return super().read_stored(document, start, stop)

    steps = load(
        Counting.open(corpus.folder),
        streams_of(corpus),
        position=0,
        dp_rank=0,
        dp_size=1,
        micro_batch=1,
        workers=1,
    )
    next(steps)
    deadline = time.monotonic() + 120
    # One step of six lanes takes at least six reads: more means the next steps are begun.
    while len(touched) <= 18 and time.monotonic() < deadline:
        time.sleep(0.01)
    steps.close()
    assert len(touched) > 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dp_size": 4}, "batch_size=6 is not a multiple of dp_size=4.*use 8"),
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank=2 is not a rank of dp_size=2"),
        ({"micro_batch": 4}, "micro_batch=4 does not divide the 6 streams.*use 3"),
        ({"micro_batch": 0}, "micro_batch=0 does not divide.*use 1"),
        ({"position": 7}, "position=7 is not a multiple of train.batch_size=6"),
        ({"position": -6}, "position=-6 is not"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
    ],
)
def test_impossible_layouts_are_refused_before_anything_is_read(
    corpus: Corpus, change: dict[str, int], message: str
) -> None:
    arguments = {"position": 0, "dp_rank": 0, "dp_size": 1, "micro_batch": 1, **change}
    with pytest.raises(ValueError, match=message):
        load(corpus, streams_of(corpus), **arguments)


def test_streams_of_another_corpus_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    other = open_numbers(tmp_path / "other", [4, 4])
    with pytest.raises(ValueError, match="made for 2 documents, the corpus holds 12"):
        load(corpus, streams_of(other), position=0, dp_rank=0, dp_size=1, micro_batch=1)
