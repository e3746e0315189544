"""Losses by position: against slow twins, over ranks, and from the command line's side."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.index import Corpus
from data.shards import write_corpus
from data.streams import Streams
from model.config import FamMemory, MemoryConfig, ModelConfig, NoMemory, WindowMemory
from model.decoder import Decoder, Output
from model.init import initialise
from model.local import FoldedSequence
from parallel.mesh import build_mesh
from parallel.ring import choose_exchange
from parallel.slicing import choose_layout
from tests.data.corpora import Numbers
from tests.ranks import run_ranks
from tests.train.runs import small
from train.config import validate
from train.evaluate import Forward, choose_lanes, count_steps, evaluate, run
from train.positions import Gain, PositionLosses, bucket_edges, describe_gain, gain, table

S = 16
VOCAB = 50
LENGTHS = (100, 7, 48, 33, 1, 70, 16, 17)
MEMORIES = {
    "none": NoMemory(),
    "window": WindowMemory(segments=1),
    "fam": FamMemory(slots=4, window=1),
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
    sums, counts, passages = [0.0] * (len(edges) - 1), [0] * (len(edges) - 1), []
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
        if length - 1 > S:
            passages.append((losses[S : length - 1].sum().item(), length - 1 - S))
    return PositionLosses(memory, S, edges, tuple(sums), tuple(counts), tuple(passages))


def assert_same(found: PositionLosses, expected: PositionLosses, *, ordered: bool) -> None:
    assert replace(found, sums=(), passages=()) == replace(expected, sums=(), passages=())
    # float32 sums over other orders and blocks
    assert found.sums == pytest.approx(expected.sums, rel=1e-5)
    order: Callable[[Any], Any] = (lambda x: x) if ordered else sorted
    mine, theirs = order(found.passages), order(expected.passages)
    assert [count for _, count in mine] == [count for _, count in theirs]
    assert [loss for loss, _ in mine] == pytest.approx([loss for loss, _ in theirs], rel=1e-5)


def measure(
    forward: Forward, corpus: Corpus, *, memory: bool = True, lanes: int = 1, **more: Any
) -> PositionLosses:
    settings: dict[str, Any] = {"segment_len": S, "segments": 2, "tokens": None} | more
    return evaluate(forward, corpus, lanes=lanes, memory=memory, **settings)


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
    found = gain(on, off)
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
    """A model whose losses are its tokens, and whose state counts calls."""
    seen = [(state[0] if state else 0) + 1]
    return Output(scale, tokens.float() * (labels != -100), seen)


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


def test_tokens_are_rounded_to_whole_samples() -> None:
    streams = Streams(np.array([1000]), seed=0, lanes=2, segment_len=10, segments=5)
    assert [count_steps(streams, n) for n in (1, 149, 151, 10**6, None)] == [1, 1, 2, 10, 10]


def test_lanes_are_no_more_than_documents_and_fit_the_ranks() -> None:
    assert choose_lanes(100, 8) == 8
    assert choose_lanes(3, 8) == 3
    assert choose_lanes(7, 8, dp=4) == 4
    assert choose_lanes(1, 8, dp=4) == 4


def test_buckets_are_powers_of_two_from_a_quarter_segment() -> None:
    assert bucket_edges(16, 16) == (0, 4, 8, 16)
    assert bucket_edges(16, 17) == (0, 4, 8, 16, 32)
    assert bucket_edges(100, 500) == (0, 25, 50, 100, 200, 400, 800)
    assert bucket_edges(2, 3) == (0, 1, 2, 4)


def measure_on_rank(folder: Path, cp: int, name: str, memory: bool) -> PositionLosses:
    mesh = build_mesh(tp=1, cp=cp)
    layout = choose_layout("zigzag", cp)
    sequence = FoldedSequence(layout, choose_exchange("ring", mesh.cp_group))
    model = make_model(MEMORIES[name], sequence=sequence)
    corpus = Corpus.open(folder)
    return measure(forward_of(model), corpus, memory=memory, lanes=4, mesh=mesh, layout=layout)


@pytest.mark.gloo
@pytest.mark.parametrize("name", ["window", "fam"])
@pytest.mark.parametrize("cp", [1, 2])
def test_two_ranks_find_what_one_process_finds(cp: int, name: str, corpus: Corpus) -> None:
    expected = measure(forward_of(make_model(MEMORIES[name])), corpus, lanes=4)
    ranks = run_ranks(2, measure_on_rank, corpus.folder, cp, name, True)
    assert ranks[0] == ranks[1]
    assert_same(ranks[0], expected, ordered=True)


@pytest.mark.gloo
def test_two_ranks_forget_alike(corpus: Corpus) -> None:
    forward = forward_of(make_model(MEMORIES["fam"]))
    expected = measure(forward, corpus, lanes=4, memory=False)
    ranks = run_ranks(2, measure_on_rank, corpus.folder, 2, "fam", False)
    assert_same(ranks[0], expected, ordered=True)


def losses(memory: bool, *passages: tuple[float, int]) -> PositionLosses:
    total, count = sum(loss for loss, _ in passages), sum(n for _, n in passages)
    return PositionLosses(memory, 4, (0, 4, 8), (8.0, total), (4, count), passages)


def test_gain_is_over_tokens_and_its_error_over_passages() -> None:
    on, off = losses(True, (10.0, 10), (20.0, 30)), losses(False, (15.0, 10), (23.0, 30))
    # 8 nats in 40 tokens; documents deviate from 0.2 a token by +3 and -3
    assert gain(on, off) == Gain(pytest.approx(0.2), pytest.approx(6 / 40), 2, 40)
    assert describe_gain(on, off) == (
        "+0.2000 +- 0.1500 nats a token beyond the first segment (40 tokens of 2 passages)"
    )


def test_one_document_has_no_error_and_none_no_gain() -> None:
    found = gain(losses(True, (1.0, 2)), losses(False, (2.0, 2)))
    assert found == Gain(0.5, None, 1, 2)
    assert gain(losses(True), losses(False)) is None
    assert "nothing shows" in describe_gain(losses(True), losses(False))


def test_the_table_compares() -> None:
    on, off = losses(True, (10.0, 1000)), losses(False, (15.0, 1000))
    assert table(on, off).splitlines() == [
        "position  tokens  memory on  memory off  off - on",
        "   0 - 3       4     2.0000      2.0000   +0.0000",
        "   4 - 7   1,000     0.0100      0.0150   +0.0050",
        "     all   1,004     0.0179      0.0229   +0.0050",
    ]
    assert table(None, off).splitlines()[0] == "position  tokens  memory off"


def use_model(monkeypatch: pytest.MonkeyPatch, name: str, valid: Path | None) -> None:
    raw = small(
        data__segment_len=S,
        data__sample_len=2 * S,
        data__valid=str(valid) if valid else None,
        model__memory={"name": name} | ({"slots": 4} if name == "fam" else {}),
    )
    found = (make_model(MEMORIES[name]), validate(raw))
    monkeypatch.setattr("train.snapshot.read_model", lambda folder: found)


def test_the_command_measures_both_ways_and_writes_what_it_found(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_model(monkeypatch, "fam", corpus.folder)
    output = tmp_path / "results" / "on.json"
    assert run(Path("runs/small"), data=None, memory=True, tokens=None, output=output) == 0
    printed = capsys.readouterr().out
    assert "memory on  memory off  off - on" in printed and "memory's gain: " in printed
    written = json.loads(output.read_text())
    assert [entry["memory"] for entry in written["evaluations"]] == ["on", "off"]
    assert written["gain"]["passages"] > 1
    assert written["evaluations"][0]["positions"][0].keys() == {
        "first",
        "last",
        "tokens",
        "loss",
    }
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("name", "memory", "column"), [("none", True, "memory on"), ("fam", False, "memory off")]
)
def test_the_command_measures_one_way_where_one_is_enough(
    name: str,
    memory: bool,
    column: str,
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_model(monkeypatch, name, None)
    assert run(Path("runs/small"), data=corpus.folder, memory=memory) == 0
    assert capsys.readouterr().out.splitlines()[2].split("  ")[-1] == column


def test_the_command_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, "none", None)
    with pytest.raises(ValueError, match="--data FOLDER"):
        run(Path("runs/small"))
    write_documents(tmp_path, [np.arange(60)], vocab_size=VOCAB + 20)
    with pytest.raises(ValueError, match="tokens up to 69, the model's vocab_size is 50"):
        run(Path("runs/small"), data=tmp_path)
