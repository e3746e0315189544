"""Several corpora read as one, whole or shard by shard, on any layout."""

import io
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.counts import counts_file, read_counts, write_counts
from data.index import Corpus, _parse
from data.loader import load
from data.mixture import Component, Mixture, Share, choose_quotas, plan
from data.shards import INDEX_DTYPE
from data.streams import IGNORE, Streams
from data.wide import WideCorpus
from tests.data.corpora import write_numbers

SEGMENT_LEN, LANES = 4, 12
FIRST = [17, 1, 40, 3, 9, 26, 2, 33, 12, 8, 51, 5]
SECOND = [30, 5, 5, 21, 70, 2, 14, 14, 9]


def write_two(folder: Path) -> list[Path]:
    """Return two corpora of several shards; their tokens are different numbers."""
    write_numbers(folder / "a", FIRST, shard_tokens=40)
    write_numbers(folder / "b", SECOND, shard_tokens=40, first=1000)
    return [folder / "a", folder / "b"]


def opened(paths: list[Path], *, wide: bool, weights: tuple[float, float] = (2, 1)) -> Mixture:
    kind = WideCorpus if wide else Corpus
    return Mixture(
        [
            Component(path.name, kind.open(path), weight)
            for path, weight in zip(paths, weights, strict=True)
        ]
    )


def streams_of(mixture: Mixture, shards: int | None = None) -> Streams:
    counts = None
    if shards is not None:
        counts = [part.corpus.scan(SEGMENT_LEN) for part in mixture.components]
    order, _ = plan(mixture, counts, seed=5, segment_len=SEGMENT_LEN, shuffle_shards=shards)
    return Streams.over(order, lanes=LANES, segments=3)


def read_steps(
    mixture: Mixture, shards: int | None, first: int, steps: int, dp_size: int, workers: int
) -> list[tuple[int, bytes]]:
    """Return (position, all bytes) of the samples of these steps, read by all ranks."""
    ranks = [
        load(
            mixture,
            streams_of(mixture, shards),
            position=first,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch=1,
            workers=workers,
            steps=steps,
        )
        for rank in range(dp_size)
    ]
    return [
        (batch.first_position, b"".join(tensor.numpy().tobytes() for tensor in batch[:4]))
        for step in zip(*ranks, strict=True)
        for batches in step
        for batch in batches
    ]


@pytest.mark.parametrize("shards", [None, 1, 2])
def test_layouts_changed_in_the_middle_give_the_same_samples(
    shards: int | None, tmp_path: Path
) -> None:
    paths = write_two(tmp_path)
    expected = read_steps(opened(paths, wide=shards is not None), shards, 0, 40, 1, 0)
    got: list[tuple[int, bytes]] = []
    for steps, dp_size, workers in [(7, 4, 0), (9, 2, 1), (11, 3, 3), (1, 1, 2), (12, 6, 1)]:
        mixture = opened(paths, wide=shards is not None)  # anew, as after a crash
        got += read_steps(mixture, shards, len(got), steps, dp_size, workers)
    assert [position for position, _ in got] == list(range(40 * LANES))
    assert got == expected


@given(
    first=st.lists(st.integers(1, 30), min_size=1, max_size=10),
    second=st.lists(st.integers(2, 30), min_size=1, max_size=10),
    weights=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    shards=st.none() | st.integers(1, 3),
    epochs=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_tokens_read_are_those_of_the_quotas_each_as_often_as_it_should(
    first: list[int],
    second: list[int],
    weights: tuple[int, int],
    shards: int | None,
    epochs: int,
) -> None:
    with TemporaryDirectory() as folder:
        paths = [Path(folder, "a"), Path(folder, "b")]
        write_numbers(paths[0], first, shard_tokens=20)
        write_numbers(paths[1], second, shard_tokens=20, first=1000)
        mixture = opened(paths, wide=shards is not None, weights=weights)
        streams = streams_of(mixture, shards)
        seen: Counter[int] = Counter()
        for (batch,) in load(
            mixture,
            streams,
            position=0,
            dp_rank=0,
            dp_size=1,
            micro_batch=LANES,
            workers=0,
            steps=epochs * streams.steps_per_epoch,
        ):
            target = batch.labels != IGNORE
            seen.update(batch.tokens[target].tolist())
        _, shares = plan(
            opened(paths, wide=False, weights=weights),
            None,
            seed=5,
            segment_len=SEGMENT_LEN,
            shuffle_shards=None,
        )
        for share, part in zip(shares, mixture.components, strict=True):
            low = epochs * share.quota // share.segments
            begin, lengths = (1, first) if part.name == "a" else (1000, second)
            for token in range(begin, begin + sum(lengths) - len(lengths)):
                assert low <= seen[token] <= share.most_reads(epochs)


def test_shares_are_of_tokens() -> None:
    tokens, segments = [10_000_000, 3_000_000], [2_500_000, 1_000_000]
    quotas = choose_quotas([Fraction(7, 10), Fraction(3, 10)], tokens, segments)
    read = [
        quota * held / count for quota, held, count in zip(quotas, tokens, segments, strict=True)
    ]
    assert quotas[1] == segments[1]  # the first to run out: 0.3 of the tokens, 3/13 of all
    assert read[0] / sum(read) == pytest.approx(0.7, abs=1e-6)


def test_a_share_is_read_evenly_and_its_limit_is_exact() -> None:
    share = Share("books", tokens=1000, segments=100, quota=30)
    assert [share.most_reads(epochs) for epochs in (1, 3, 4, 6, 7)] == [1, 1, 2, 2, 3]
    assert (share.most_epochs(1), share.most_epochs(2)) == (3, 6)


def test_the_fingerprint_is_that_of_all_parts_and_their_weights(tmp_path: Path) -> None:
    a, b = write_two(tmp_path)
    fingerprint = opened([a, b], wide=False, weights=(0.2, 0.1)).fingerprint
    assert opened([b, a], wide=False, weights=(10, 20)).fingerprint == fingerprint
    assert opened([a, b], wide=True, weights=(2, 1)).fingerprint == fingerprint
    assert opened([a, b], wide=False, weights=(2, 2)).fingerprint != fingerprint


def test_the_order_of_the_list_does_not_matter(tmp_path: Path) -> None:
    a, b = write_two(tmp_path)
    one, two = opened([a, b], wide=False), opened([b, a], wide=False, weights=(1, 2))
    assert read_steps(one, None, 0, 8, 1, 0) == read_steps(two, None, 0, 8, 1, 0)


def test_a_mixture_of_one_is_the_corpus(tmp_path: Path) -> None:
    a, _ = write_two(tmp_path)
    corpus = Corpus.open(a)
    alone = Mixture([Component("a", corpus, 3)])
    plain = Streams(corpus.lengths, seed=5, lanes=LANES, segment_len=SEGMENT_LEN, segments=3)
    streams = streams_of(alone)
    assert [streams.sample(n) for n in range(200)] == [plain.sample(n) for n in range(200)]
    assert alone.fingerprint == corpus.fingerprint


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    a, _ = write_two(tmp_path)
    write_numbers(tmp_path / "other", [5], vocab_size=99)
    with pytest.raises(ValueError, match="other was made with tokenizer numbers-99.*a with"):
        opened([a, tmp_path / "other"], wide=False)


def test_the_same_documents_twice_are_refused(tmp_path: Path) -> None:
    write_numbers(tmp_path / "a", FIRST)
    write_numbers(tmp_path / "again", FIRST)
    with pytest.raises(ValueError, match="hold the same documents"):
        opened([tmp_path / "a", tmp_path / "again"], wide=False)


# an index that is not in memory


def test_a_wide_corpus_reads_what_a_corpus_does(tmp_path: Path) -> None:
    a, _ = write_two(tmp_path)
    near, wide = Corpus.open(a), WideCorpus.open(a)
    assert (wide.documents, wide.fingerprint) == (near.documents, near.fingerprint)
    for document, length in enumerate(near.lengths.tolist()):
        assert wide.length(document) == length
        assert wide.read(document, 0, length).tolist() == near.read(document, 0, length).tolist()


def test_a_scan_counts_the_segments_of_each_shard(tmp_path: Path) -> None:
    a, _ = write_two(tmp_path)
    near, wide = Corpus.open(a), WideCorpus.open(a)
    tables = [near.table(number) for number in range(len(near.manifest.shards))]
    expected = [sum(-(-n // SEGMENT_LEN) for n in table.lengths.tolist()) for table in tables]
    assert wide.scan(SEGMENT_LEN).tolist() == expected


def test_tables_that_nobody_holds_are_forgotten(tmp_path: Path) -> None:
    write_numbers(tmp_path / "many", [9] * 100, shard_tokens=9)
    wide = WideCorpus.open(tmp_path / "many")
    for document in range(100):
        assert wide.length(document) == 9
    assert len(wide._held) <= 16


def test_a_lost_index_is_an_error_that_names_it(tmp_path: Path) -> None:
    a, _ = write_two(tmp_path)
    lost = sorted(a.glob("*.idx.npy"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost.name} is missing"):
        WideCorpus.open(a, on_damage="skip").scan(SEGMENT_LEN)


def test_a_resized_shard_is_found_before_the_first_step(tmp_path: Path) -> None:
    a, _ = write_two(tmp_path)
    shard = sorted(a.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match=f"{shard.name} has .* bytes, the manifest says"):
        WideCorpus.open(a).check()
    skipping = WideCorpus.open(a, on_damage="skip")
    skipping.check()
    assert shard.name in skipping.damage[0]


def test_a_flipped_bit_keeps_its_place_and_is_named_once(tmp_path: Path) -> None:
    a, b = write_two(tmp_path)
    shard = sorted(a.glob("*.tar"))[2]
    content = bytearray(shard.read_bytes())
    content[520] ^= 1
    shard.write_bytes(content)
    kinds = [WideCorpus.open(path, on_damage="skip") for path in (a, b)]
    mixture = Mixture([Component(str(n), corpus, 1) for n, corpus in enumerate(kinds)])
    read_steps(mixture, 1, 0, 30, 1, 0)
    (named,) = mixture.damage
    assert shard.name in named and "crc32" in named


# counts kept in a file


def counted(folder: Path) -> tuple[WideCorpus, Path]:
    a, _ = write_two(folder)
    corpus = WideCorpus.open(a)
    path = counts_file(folder / "run", corpus, SEGMENT_LEN)
    write_counts(path, corpus, SEGMENT_LEN, corpus.scan(SEGMENT_LEN))
    return corpus, path


def test_counts_are_read_as_they_were_written(tmp_path: Path) -> None:
    corpus, path = counted(tmp_path)
    counts = read_counts(path, corpus, SEGMENT_LEN)
    assert counts is not None and np.array_equal(counts, corpus.scan(SEGMENT_LEN))


@pytest.mark.parametrize("change", ["missing", "cut", "count", "format", "list", "empty"])
def test_damaged_counts_are_not_believed(change: str, tmp_path: Path) -> None:
    corpus, path = counted(tmp_path)
    text = path.read_text()
    values = json.loads(text)
    values["segments"][0] += 1
    path.write_text(
        {
            "missing": "",
            "cut": text[:-9],
            "count": json.dumps(values),
            "format": text.replace("segments-1", "segments-2"),
            "list": "[1]",
            "empty": "{}",
        }[change]
    )
    if change == "missing":
        path.unlink()
    assert read_counts(path, corpus, SEGMENT_LEN) is None


def test_counts_of_another_segment_len_or_corpus_are_not_believed(tmp_path: Path) -> None:
    corpus, path = counted(tmp_path)
    assert read_counts(path, corpus, SEGMENT_LEN + 1) is None
    assert read_counts(path, WideCorpus.open(tmp_path / "b"), SEGMENT_LEN) is None


def test_indices_are_read_without_what_two_threads_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # np.load parses a header with `ast`: once in some thousand times a SystemError, Python 3.11
    a, _ = write_two(tmp_path)
    monkeypatch.setattr(np, "load", None)
    assert WideCorpus.open(a).scan(SEGMENT_LEN).sum() > 0


def test_an_index_whose_header_another_numpy_wrote_is_read(tmp_path: Path) -> None:
    write_numbers(tmp_path / "a", FIRST)
    table = Corpus.open(tmp_path / "a").table(0)
    rows = np.zeros(len(table.lengths), dtype=INDEX_DTYPE)
    rows["length"] = table.lengths
    content = io.BytesIO()
    np.lib.format.write_array(content, rows, version=(2, 0))
    assert _parse(content.getvalue(), len(rows))["length"].tolist() == table.lengths.tolist()
