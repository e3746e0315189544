"""Losses by position with the memory on, off and shuffled: against slow twins, over ranks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.index import Corpus
from data.landmarks import insert_landmarks
from data.shards import write_corpus
from data.streams import Batch, Streams
from model.config import (
    AbcMemory,
    ArmtMemory,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    LandmarkMemory,
    MemoryConfig,
    ModelConfig,
    NoMemory,
    RmtMemory,
    WindowMemory,
)
from model.decoder import Decoder, Output
from model.init import initialise
from model.local import FoldedSequence
from parallel.mesh import build_mesh
from parallel.ring import choose_exchange
from parallel.slicing import choose_layout
from tests.cases import case
from tests.data.corpora import Numbers
from tests.ranks import run_ranks
from train.evaluation.measure import ALL, Forward, choose_lanes, count_steps
from train.evaluation.measure import measure as measure_all
from train.evaluation.positions import Condition, Evaluation, Part, PositionLosses, bucket_edges
from train.evaluation.verdict import difference

S = 16
VOCAB = 50
LENGTHS = (100, 7, 48, 33, 1, 70, 16, 17)
MEMORIES = {
    "none": NoMemory(),
    "window": WindowMemory(segments=1),
    "fam": FamMemory(slots=4, window=1),
    "infini": InfiniMemory("delta", window=1),
    "abc": AbcMemory(slots=3),
    "rmt": RmtMemory(slots=2),
    "armt": ArmtMemory(slots=2, key_dim=4, window=1),
    "hmt": HmtMemory(bank=5, sensory=2, search_dim=4),
    "landmark": LandmarkMemory(block=4, window=1),
}


def model_config(memory: MemoryConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        num_kv_heads=1,
        ffn_size=24,
        head_dim=8,
        init_std=0.3,  # large, so that the past changes the losses
        memory=memory,
    )


def make_model(memory: MemoryConfig, **layout: Any) -> Decoder:
    config = model_config(memory)
    model = Decoder(config, **layout)
    initialise(model, config, seed=1)
    return model


def forward_of(model: Decoder) -> Forward:
    def forward(tokens: Any, starts: Any, state: Any, labels: Any, scale: Any) -> Output:
        output: Output = model(tokens, starts, state, labels=labels, scale=scale)
        return output

    return forward


def write_documents(folder: Path, documents: list[Any], vocab_size: int = VOCAB) -> Corpus:
    write_corpus(folder, documents, tokenizer=Numbers(vocab_size))
    return Corpus.open(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    random = np.random.default_rng(0)
    documents = [random.integers(1, VOCAB, length - 1) for length in LENGTHS]
    return write_documents(tmp_path / "valid", documents)


def read_slowly(model: Decoder, corpus: Corpus, memory: bool) -> PositionLosses:
    """Return what evaluate must find: one document at a time, one call each, plain loops."""
    edges = bucket_edges(S, max(LENGTHS))
    sums, counts, parts = [0.0] * (len(edges) - 1), [0] * (len(edges) - 1), []
    for document, length in enumerate(corpus.lengths.tolist()):
        segments = -(-length // S)
        text = torch.from_numpy(corpus.read(document, 0, length))
        tokens, labels = torch.zeros(segments * S).long(), torch.full((segments * S,), -100)
        tokens[:length], labels[: length - 1] = text, text[1:]
        shape = (1, segments, S) if memory else (segments, 1, S)  # rows are independent
        with torch.no_grad():
            losses = model(
                tokens.view(shape),
                torch.zeros(shape[:2], dtype=torch.bool),
                labels=labels.view(shape),
                scale=torch.ones(()),
            ).token_losses.flatten()
        for position in range(length - 1):
            bucket = max(i for i, edge in enumerate(edges) if edge <= position)
            sums[bucket] += losses[position].item()
            counts[bucket] += 1
        for bucket in range(edges.index(S), len(edges) - 1):
            late = losses[edges[bucket] : min(edges[bucket + 1], length - 1)]
            if len(late):
                parts.append(Part(document, bucket, late.sum().item(), len(late)))
    condition: Condition = "on" if memory else "off"
    return PositionLosses(condition, S, edges, tuple(sums), tuple(counts), tuple(parts))


def assert_same(found: PositionLosses, expected: PositionLosses, *, ordered: bool) -> None:
    assert replace(found, sums=(), parts=()) == replace(expected, sums=(), parts=())
    # float32 sums over other orders and blocks
    assert found.sums == pytest.approx(expected.sums, rel=1e-5)
    order: Callable[[Any], Any] = (lambda x: x) if ordered else sorted
    mine, theirs = order(found.passages), order(expected.passages)
    assert [count for _, count in mine] == [count for _, count in theirs]
    assert [loss for loss, _ in mine] == pytest.approx([loss for loss, _ in theirs], rel=1e-5)


def evaluate(
    forward: Forward, corpus: Corpus, *conditions: Condition, lanes: int = 1, **more: Any
) -> Evaluation:
    settings: dict[str, Any] = {"segment_len": S, "segments": 2, "tokens": None} | more
    return measure_all(forward, corpus, lanes=lanes, conditions=conditions or ALL, **settings)


def measure(
    forward: Forward, corpus: Corpus, *, memory: bool = True, **more: Any
) -> PositionLosses:
    found = evaluate(forward, corpus, "on" if memory else "off", **more)
    losses = found.on if memory else found.off
    assert losses is not None and len(found.columns) == 1
    return losses


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("memory", [True, False])
def test_losses_equal_documents_read_one_by_one(name: str, memory: bool, corpus: Corpus) -> None:
    model = make_model(MEMORIES[name])
    found = measure(forward_of(model), corpus, memory=memory)
    assert_same(found, read_slowly(model, corpus, memory), ordered=False)


@pytest.mark.parametrize("name", ["window", "fam"])
def test_the_memory_matters_beyond_the_first_segment_only(name: str, corpus: Corpus) -> None:
    forward = forward_of(make_model(MEMORIES[name]))
    on, off = (measure(forward, corpus, memory=memory) for memory in (True, False))
    first = on.edges.index(S)
    assert on.sums[:first] == pytest.approx(off.sums[:first], rel=1e-5)
    for kept, forgot in zip(on.sums[first:], off.sums[first:], strict=True):
        assert abs(kept - forgot) > 1e-3 * forgot


def test_without_memory_nothing_changes(corpus: Corpus) -> None:
    forward = forward_of(make_model(NoMemory()))
    on, off = (measure(forward, corpus, memory=memory) for memory in (True, False))
    found = difference(on, off)
    assert found is not None and abs(found.mean) < 1e-6


def test_every_target_is_read_once_whatever_the_lanes(corpus: Corpus) -> None:
    forward = forward_of(make_model(NoMemory()))
    expected = measure(forward, corpus)
    assert expected.tokens == sum(LENGTHS) - len(LENGTHS)
    for lanes, micro_batch in ((3, 1), (4, 3), (8, 8)):
        found = measure(forward, corpus, lanes=lanes, micro_batch=micro_batch)
        assert found.tokens == expected.tokens
        # no memory: the lanes cannot change a loss
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def tell_tokens(tokens: Any, starts: Any, state: Any, labels: Any, scale: Any) -> Output:
    """A model whose losses are its tokens, and whose state is the last token of each stream."""
    return Output(scale, tokens.float() * (labels != -100), [tokens[:, -1, -1].clone()])


def test_positions_are_those_in_the_document(tmp_path: Path) -> None:
    corpus = write_documents(tmp_path, [np.arange(60), np.arange(11)], vocab_size=100)
    found = measure(tell_tokens, corpus)
    assert found.edges == (0, 4, 8, 16, 32, 64)
    assert found.counts == (8, 8, 8 + 3, 16, 28)
    assert found.means[0] == np.mean([0, 1, 2, 3])
    assert found.means[-1] == np.mean(np.arange(32, 60))
    assert found.passages == ((sum(range(16, 60)), 44),)


def test_a_document_entered_in_the_middle_counts_from_there(tmp_path: Path) -> None:
    corpus = write_documents(tmp_path, [np.arange(8 * S - 1)], vocab_size=200)
    found = measure(tell_tokens, corpus, lanes=2)  # four segments a lane
    assert found.edges[-1] == 4 * S
    assert found.counts == (8, 8, 16, 32, 63)
    assert [count for _, count in found.passages] == [3 * S, 3 * S - 1]


def test_tokens_put_among_the_texts_count_for_nothing(tmp_path: Path) -> None:
    corpus = write_documents(tmp_path, [np.arange(60), np.arange(11)], vocab_size=100)

    def prepare(batch: Batch) -> Batch:
        return insert_landmarks(batch, 5, landmark=1000)  # 16 tokens become 20

    plain, marked = (measure(tell_tokens, corpus, **o) for o in ({}, {"prepare": prepare}))
    assert marked == plain


def test_tokens_are_rounded_to_whole_samples() -> None:
    streams = Streams(np.array([1000]), seed=0, lanes=2, segment_len=10, segments=5)
    assert [count_steps(streams, n) for n in (1, 149, 151, 10**6, None)] == [1, 1, 2, 10, 10]


def test_lanes_are_no_more_than_documents_and_fit_the_ranks() -> None:
    assert choose_lanes(100, 8) == 8
    assert choose_lanes(100, 1) == 2  # one to read, one to exchange its memory with
    assert choose_lanes(100, 4, dp=4) == 8
    assert choose_lanes(3, 8) == 2
    assert choose_lanes(7, 8, dp=4) == 4
    assert choose_lanes(1, 8, dp=4) == 4


def test_buckets_are_powers_of_two_from_a_quarter_segment() -> None:
    assert bucket_edges(16, 16) == (0, 4, 8, 16)
    assert bucket_edges(16, 17) == (0, 4, 8, 16, 32)
    assert bucket_edges(100, 500) == (0, 25, 50, 100, 200, 400, 800)
    assert bucket_edges(2, 3) == (0, 1, 2, 4)


def read_shuffled_slowly(model: Decoder, corpus: Corpus, keep_window: bool) -> dict[Any, float]:
    """Return the losses of two lanes' later segments with the other lane's state, by twin loops.

    Streams alone, a segment a call; only what lies in the past of another document is swapped.
    """
    streams = Streams(corpus.lengths, seed=0, lanes=2, segment_len=S, segments=1)
    states: list[Any] = [None, None]
    documents: list[Any] = [None, None]
    found = {}
    for step in range(streams.steps_per_epoch):
        now = [streams.sample(2 * step + lane)[0] for lane in range(2)]
        before, after = list(states), list(states)
        for lane, read in enumerate(now):
            if read is None:
                after[lane] = None
                continue
            end = min(read.stop + 1, int(corpus.lengths[read.document]))
            text = torch.from_numpy(corpus.read(read.document, read.start, end))
            length = read.stop - read.start
            tokens = torch.full((1, 1, S), corpus.manifest.end_of_document)
            labels = torch.full((1, 1, S), -100)
            tokens[0, 0, :length] = text[:length]
            labels[0, 0, : len(text) - 1] = text[1:]
            starts = torch.tensor([[read.starts]])
            options = {"labels": labels, "scale": torch.ones(())}
            with torch.no_grad():
                after[lane] = model(tokens, starts, before[lane], **options).state
                other = 1 - lane
                if read.starts or documents[other] in (None, read.document):
                    continue
                theirs = before[other]
                if keep_window:
                    layers = zip(theirs.layers, before[lane].layers, strict=True)
                    kept = [his._replace(window=mine.window) for his, mine in layers]
                    theirs = theirs._replace(layers=kept)
                losses = model(tokens, starts, theirs, **options).token_losses
                found[step, lane] = losses.sum().item()
        states, documents = after, [None if read is None else read.document for read in now]
    return found


@pytest.mark.parametrize("name", [name for name in MEMORIES if name != "none"])
@pytest.mark.parametrize("segments", [1, 3])
def test_shuffled_is_the_other_streams_state_in_place_of_the_own(
    name: str, segments: int, corpus: Corpus
) -> None:
    model = make_model(MEMORIES[name])
    found = evaluate(forward_of(model), corpus, lanes=2, segments=segments)
    expected = read_shuffled_slowly(model, corpus, keep_window=False)
    assert found.shuffled is not None and found.on is not None
    assert len(expected) > 5
    total = sum(loss for loss, _ in found.shuffled.passages)
    assert total == pytest.approx(sum(expected.values()), rel=1e-5)
    assert found.paired is not None and found.paired.counts == found.shuffled.counts
    assert abs(total - sum(loss for loss, _ in found.paired.passages)) > 1e-3 * total


@pytest.mark.parametrize("name", ["fam", "infini", "armt"])
def test_beyond_the_window_the_windows_keys_stay_the_own(name: str, corpus: Corpus) -> None:
    model = make_model(MEMORIES[name])
    found = evaluate(forward_of(model), corpus, lanes=2)
    expected = read_shuffled_slowly(model, corpus, keep_window=True)
    assert found.beyond is not None and found.shuffled is not None
    total = sum(loss for loss, _ in found.beyond.passages)
    assert total == pytest.approx(sum(expected.values()), rel=1e-5)
    assert found.beyond.passages != found.shuffled.passages


@pytest.mark.parametrize("name", ["window", "fam"])
@pytest.mark.parametrize(("lanes", "micro_batch"), [(2, 1), (4, 1), (6, 2), (4, 4)])
def test_shuffling_beside_it_leaves_memory_on_and_off_as_they_are(
    name: str, lanes: int, micro_batch: int, corpus: Corpus
) -> None:
    forward = forward_of(make_model(MEMORIES[name]))
    found = evaluate(forward, corpus, lanes=lanes, micro_batch=micro_batch)
    for condition, losses in ((True, found.on), (False, found.off)):
        assert losses is not None
        alone = measure(forward, corpus, memory=condition, lanes=lanes)
        assert_same(losses, alone, ordered=True)


def test_where_a_document_begins_there_is_nothing_to_shuffle(corpus: Corpus) -> None:
    found = evaluate(forward_of(make_model(MEMORIES["fam"])), corpus, lanes=2)
    assert found.on is not None and found.shuffled is not None and found.beyond is not None
    first = found.on.edges.index(S)
    for other in (found.shuffled, found.beyond):
        assert other.counts[:first] == found.on.counts[:first]
        assert other.sums[:first] == pytest.approx(found.on.sums[:first], rel=1e-6)


def test_a_window_alone_has_nothing_beyond_it(corpus: Corpus) -> None:
    assert evaluate(forward_of(make_model(MEMORIES["window"])), corpus, lanes=2).beyond is None


def test_one_stream_or_one_document_cannot_be_shuffled(corpus: Corpus, tmp_path: Path) -> None:
    forward = forward_of(make_model(MEMORIES["fam"]))
    alone = evaluate(forward, corpus, lanes=1)
    assert alone.shuffled is None and alone.paired is None and alone.off is not None
    assert alone.unshuffled is not None and "one stream a rank" in alone.unshuffled
    single = write_documents(tmp_path / "one", [np.arange(1, 9 * S) % VOCAB])
    found = evaluate(forward, single, lanes=2)
    assert found.shuffled is None and "one document" in str(found.unshuffled)


def test_streams_in_the_same_document_are_not_exchanged(tmp_path: Path) -> None:
    # lane 0 reads the long document's first half, lane 1 its second half and then the short one
    long, short = np.arange(1, 12 * S) % VOCAB, np.arange(1, S) % VOCAB
    corpus = write_documents(tmp_path, [long, short])
    found = evaluate(forward_of(make_model(MEMORIES["fam"])), corpus, lanes=2, segments=1)
    late = found.shuffled.passages if found.shuffled else ()
    assert found.on is not None
    assert sum(n for _, n in late) <= S < sum(n for _, n in found.on.passages)


def test_cost_is_measured_beside_the_loss(corpus: Corpus) -> None:
    found = evaluate(forward_of(make_model(MEMORIES["fam"])), corpus, lanes=2)
    # two layers: 4 slots of 16 floats, fresh; a window of 16 keys and values of 8 floats, its age
    assert found.state_bytes == 2 * (4 * 16 * 4 + 1 + 2 * 16 * 8 * 4 + 8)
    assert found.tokens_per_s > 0
    assert evaluate(forward_of(make_model(NoMemory())), corpus, "on").state_bytes == 2 * 8


SHARED = ("window", "fam", "infini", "rmt", "hmt")


def measure_on_rank(folder: Path, cp: int) -> dict[str, Evaluation]:
    mesh = build_mesh(tp=1, cp=cp)
    layout = choose_layout("zigzag", cp)
    corpus, found = Corpus.open(folder), {}
    for name in SHARED:
        sequence = FoldedSequence(layout, choose_exchange("ring", mesh.cp_group))
        forward = forward_of(make_model(MEMORIES[name], sequence=sequence))
        with case(name):
            found[name] = evaluate(forward, corpus, lanes=4, mesh=mesh, layout=layout)
    return found


@pytest.mark.gloo
@pytest.mark.parametrize("cp", [1, 2])
def test_two_ranks_find_what_one_process_finds(cp: int, corpus: Corpus) -> None:
    # DP 2 has groups of two lanes, CP 2 and one process one of four: other donors
    groups = {"micro_batch": 2, "segments": 1} if cp == 1 else {}
    ranks = run_ranks(2, measure_on_rank, corpus.folder, cp)
    for name in SHARED:
        expected = evaluate(forward_of(make_model(MEMORIES[name])), corpus, lanes=4, **groups)
        for condition in ("on", "off", "shuffled", "beyond", "paired"):
            found = (ranks[0][name], ranks[1][name], expected)
            mine, other, alone = (getattr(e, condition) for e in found)
            with case(name, condition):
                assert mine == other
                assert (
                    (mine is None)
                    == (alone is None)
                    == (condition == "beyond" and name not in ("fam", "infini"))
                )
                if mine is not None:
                    assert_same(mine, alone, ordered=True)
