"""Questions: a reader that knows only what it read, and tiny models against slow twins."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from data.shards import write_corpus
from data.streams import IGNORE
from data.tasks import Prompt
from data.tokenizer import ByteTokenizer
from model.config import (
    FamMemory,
    HmtMemory,
    MemoryConfig,
    ModelConfig,
    NoMemory,
    WindowMemory,
)
from model.decoder import Decoder
from model.init import initialise
from tests.train.runs import small
from train.evaluation.answers import Answered, DecoderReader, lay_out, measure
from train.evaluation.questions import Place, count_prompts, describe, run_tasks, summarise
from train.settings.config import validate

BYTES = ByteTokenizer()
S = 64
PROSE = "All of it was quiet. The night had come over the hills and no one spoke a word. " * 40


class Read(NamedTuple):
    """What a Copier carries: every token that it read."""

    tokens: Tensor  # [B, T]


class Copier:
    """A model with a perfect memory: it goes on as the latest place did that began like this."""

    def __init__(self, context: int, ignored: int = -1) -> None:
        self.context, self.ignored = context, ignored
        self.segments = 0

    def read(self, tokens: Tensor, state: Read | None) -> Read:
        self.segments += 1
        return Read(tokens[:, 0] if state is None else torch.cat((state.tokens, tokens[:, 0]), 1))

    def logits(self, tokens: Tensor, state: Read | None, wanted: Tensor) -> Tensor:
        rows, places = wanted[:, 0].nonzero(as_tuple=True)
        found = torch.zeros(len(rows), 300)
        for i, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
            before = [] if state is None else state.tokens[row].tolist()
            text = before + tokens[row, 0, : place + 1].tolist()
            text = [token for token in text if token != self.ignored]
            like = text[-self.context :]
            for end in range(len(text) - 1, self.context - 1, -1):
                if text[end - self.context : end] == like:
                    found[i, text[end]] = 5.0
                    break
        return found


def needle(key: str, *, before: int, after: int) -> Prompt:
    """Return a document with a code after `before` tokens, `after` more, and the question."""
    fact = f" The code is {key}."
    document = PROSE[:before] + fact + PROSE[:after]
    size = len(document) + len(" The code is") + len(key) + 1
    return Prompt(
        "passkey", document, " The code is", f" {key}", None, size, None, None, (before,)
    )  # fmt: skip


def needles(count: int, *, before: int = 30, after: int = 200) -> list[Prompt]:
    return [needle(str(1000 + 37 * i), before=before, after=after) for i in range(count)]


def ask(reader: Any, prompts: Sequence[Prompt], **more: Any) -> list[Answered]:
    return measure(reader, prompts, BYTES, segment_len=S, **more)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_only_its_own_memory_answers(batch: int) -> None:
    reader = Copier(8)
    assert ask(reader, needles(7), batch=batch) == [Answered(True, False, False, True)] * 7


def test_a_fact_beside_the_question_needs_no_memory() -> None:
    answers = ask(Copier(8), needles(4, before=300, after=5))
    assert answers == [Answered(True, True, True, False)] * 4


def test_one_segment_has_no_memory() -> None:
    reader = Copier(8)
    answers = ask(reader, needles(1, before=5, after=5))
    assert answers == [Answered(True, True, True, False)] and reader.segments == 0


def test_the_answers_come_in_the_order_of_the_prompts() -> None:
    prompts = needles(5)
    prompts[1] = prompts[1]._replace(answer=" 7777")  # nobody said so
    prompts[3:4] = needles(2, before=20, after=500)
    assert [answer.on for answer in ask(Copier(8), prompts)] == [
        True,
        False,
        True,
        True,
        True,
        True,
    ]


def test_the_answer_is_never_read_into_a_state() -> None:
    seen = []

    class Watching(Copier):
        def read(self, tokens: Tensor, state: Read | None) -> Read:
            seen.append(BYTES.decode(tokens.flatten().tolist()))
            return super().read(tokens, state)

    prompts = needles(3, before=300, after=5)
    ask(Watching(8), prompts, batch=3)
    assert seen and not any(prompt.answer in text for text in seen for prompt in prompts)


def chosen(word: str) -> Prompt:
    document = f" In the end it was {word}. {PROSE[:150]}"
    choices = (" no", " perhaps", " yes")
    return Prompt(
        "x", document, " In the end it was", f" {word}", choices, 200, None, None, (0,)
    )  # fmt: skip


def test_the_likeliest_choice_counts() -> None:
    prompts = [chosen(word) for word in ("no", "perhaps", "yes", "perhaps")]
    answers = ask(Copier(12), prompts, batch=4)
    assert [answer.on for answer in answers] == [True] * 4
    # Row i has the memory of row i - 1: none says the same.
    assert [answer.shuffled for answer in answers] == [False] * 4
    # Without one all tokens are alike: the shortest answer it is.
    assert [answer.off for answer in answers] == [True, False, False, False]


def test_question_and_answer_end_the_last_segment() -> None:
    row = lay_out(chosen("no"), BYTES, S)
    text = row.tokens.flatten()
    pad = BYTES.end_of_document
    room = len(" perhaps")
    assert row.answer_at == S - room and (text[-room:] == pad).all()
    body = text[:-room]
    begin = int((body != pad).argmax())
    assert BYTES.decode(body[begin:]) == chosen("no").document + chosen("no").question
    assert begin < S and (text[:begin] == pad).all()
    assert [BYTES.decode(ids) for ids in row.candidates] == [" no", " perhaps", " yes"]


def test_a_prompt_shorter_than_its_length_has_as_many_segments_as_the_others() -> None:
    prompt = needle("1234", before=10, after=10)
    assert len(lay_out(prompt, BYTES, S).tokens) == 1
    padded = lay_out(prompt._replace(length=3 * S), BYTES, S)
    assert len(padded.tokens) == 3 and not padded.far  # the fact is in the last one


def insert_landmarks(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Put a landmark (299) behind each 16 tokens; it predicts nothing."""

    def spread(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x.unflatten(2, (-1, 16)), (0, 1), value=value).flatten(2)

    return spread(tokens, 299), spread(labels, IGNORE)


def test_a_memory_s_own_tokens_can_be_inserted() -> None:
    expected = [Answered(True, False, False, True)] * 3
    reader = Copier(8, ignored=299)
    assert ask(reader, needles(3), prepare_batch=insert_landmarks) == expected


def test_a_question_longer_than_a_segment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"take 17 tokens, segment_len is 16"):
        measure(Copier(8), needles(2), BYTES, segment_len=16)


def test_a_prompt_that_nothing_can_be_compared_with_is_refused() -> None:
    with pytest.raises(ValueError, match="one prompt alone has 5 segments"):
        ask(Copier(8), needles(1))


MEMORIES = {"none": NoMemory(), "window": WindowMemory(1), "fam": FamMemory(4, 1)}


def make_model(memory: MemoryConfig, vocab_size: int = 257) -> Decoder:
    config = ModelConfig(vocab_size, 2, 16, 2, 1, 24, 8, init_std=0.4, memory=memory)
    model = Decoder(config)
    initialise(model, config, seed=1)
    return model


def judge_slowly(model: Decoder, prompt: Prompt, earlier: Prompt | None) -> bool:
    """Return whether a choice is right, each in one call over all segments.

    earlier: whose segments stand before the last one (None: nobody's).
    """
    row = lay_out(prompt, BYTES, S)
    scores = []
    for candidate in row.candidates:
        last = row.tokens[-1:].copy()
        end = row.answer_at + len(candidate)
        last[0, row.answer_at : end] = candidate
        past = row.tokens[:0] if earlier is None else lay_out(earlier, BYTES, S).tokens[:-1]
        tokens = torch.from_numpy(np.concatenate([past, last]))[None]
        with torch.no_grad():
            logits, _ = model(tokens, torch.zeros(tokens.shape[:2], dtype=torch.bool))
        logp = logits[0, -1, row.answer_at - 1 : end - 1].log_softmax(-1)
        scores.append(logp[range(len(candidate)), candidate].sum().item())
    return int(np.argmax(scores)) == row.right


@pytest.mark.parametrize("name", MEMORIES)
def test_choices_equal_those_of_whole_documents(name: str) -> None:
    model = make_model(MEMORIES[name])
    rng = np.random.default_rng(0)
    prompts = [
        Prompt("x", "".join(rng.choice(list("abcdefgh "), 190)), " and so", answer,
               (" a", " bc", " d"), 0, None, None, ())
        for answer in (" a", " bc", " d") * 8
    ]  # fmt: skip
    found = ask(DecoderReader(model), prompts, batch=len(prompts))
    for i, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
        assert answer.on == judge_slowly(model, prompt, prompt)
        assert answer.off == judge_slowly(model, prompt, None)
        assert answer.shuffled == judge_slowly(model, prompt, prompts[i - 1])
    if name == "none":
        assert all(answer.on == answer.off == answer.shuffled for answer in found)
    else:
        assert len({answer[:3] for answer in found}) > 2  # the three differ


@pytest.mark.parametrize("memory", [FamMemory(4, 1), HmtMemory(bank=3, sensory=2, search_dim=4)])
def test_wanted_logits_are_those_of_the_whole_segment(memory: MemoryConfig) -> None:
    model = make_model(memory)
    first, tokens = torch.randint(0, 257, (2, 5, 1, S))
    wanted = torch.rand(5, 1, S) < 0.1
    starts = torch.zeros(5, 1, dtype=torch.bool)
    reader = DecoderReader(model)
    with torch.no_grad():
        whole, _ = model(tokens, starts, model(first, starts)[1])
        found = reader.logits(tokens, reader.read(first, None), wanted)
    torch.testing.assert_close(found, whole[wanted])  # other sizes of one product


def answers(*right: tuple[int, int, int], n: int = 20) -> list[tuple[Place, list[Answered]]]:
    """Return cells with so many right of n in the three conditions."""
    return [
        (Place(100 * i, 0.5, None), [Answered(j < on, j < off, j < other, True) for j in range(n)])
        for i, (on, off, other) in enumerate(right, 1)
    ]


def test_the_verdict_is_over_all_cells() -> None:
    found = summarise("passkey", answers((18, 0, 1), (10, 1, 0)))
    assert found.verdict == "yes" and found.far == 40 and found.metric == "exact"
    assert found.on_off.value == pytest.approx(27 / 40)
    assert [cell.on.value for cell in found.cells] == [0.9, 0.5]
    assert [cell.length for cell in found.cells] == [100, 200]
    assert "memory used: yes" in describe(found)
    assert summarise("passkey", answers((20, 0, 20))).verdict == "unclear"
    assert summarise("passkey", answers((100, 0, 100), n=100)).verdict == "no"
    assert summarise("passkey", answers((0, 0, 0), n=20)).verdict == "unclear"
    assert summarise("passkey", answers((0, 0, 0), (0, 0, 0))).verdict == "no"


def test_facts_in_the_question_s_segment_say_nothing() -> None:
    near = [(Place(64, 0.5, None), [Answered(True, False, False, False)] * 50)]
    found = summarise("story_person", near)
    assert (found.far, found.verdict, found.metric) == (0, "unclear", "choice")
    assert "longer lengths" in describe(found)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["on_off"]["value"] is None


def run(names: Sequence[str], reader: Any = None, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "lengths": (250, 600), "depths": (0.0, 0.5), "prompts": 4, "seed": 0, "pairs": (1, 3),
        "segment_len": 128, "filler": [PROSE],
    }  # fmt: skip
    config = validate(small())
    model = make_model(FamMemory(4, 1))
    return run_tasks(model, config, BYTES, names, reader=reader, **settings | more)


def test_a_perfect_memory_is_found_used() -> None:
    heard: list[int] = []
    passkey, recall = run(["passkey", "recall"], Copier(14), done=heard.append)
    for result in (passkey, recall):
        assert result.verdict == "yes"
        assert all(cell.on.value == 1.0 and cell.n == 4 for cell in result.cells)
    assert [(cell.length, cell.depth) for cell in passkey.cells] == [
        (256, 0.0), (256, 0.5), (640, 0.0), (640, 0.5)
    ]  # fmt: skip
    assert [cell.pairs for cell in recall.cells] == [1, 3, 1, 3]
    names = ["passkey", "recall"]
    assert sum(heard) == count_prompts(names, (250, 600), (0, 0.5), 4, (1, 3)) == 32


def test_a_model_without_training_is_measured_and_written(tmp_path: Path) -> None:
    results = run(["story_person", "passkey"], lengths=(600,))
    written = json.loads(json.dumps([result.to_json() for result in results], allow_nan=False))
    assert [result["task"] for result in written] == ["story_person", "passkey"]
    cell = written[0]["cells"][0]
    assert cell.keys() == {"length", "depth", "pairs", "n", "on", "off", "shuffled"}
    assert cell["on"].keys() == {"value", "low", "high"}
    assert all(result.verdict != "yes" for result in results)


def test_cells_that_cannot_be_asked_are_left_out() -> None:
    [result] = run(["recall"], Copier(14), pairs=(1, 12))
    assert [(cell.length, cell.pairs) for cell in result.cells] == [(256, 1), (640, 1), (640, 12)]
    with pytest.raises(ValueError, match="40 facts take"):
        run(["recall"], Copier(14), pairs=(40,))


def test_the_run_s_held_out_documents_are_the_filler(tmp_path: Path) -> None:
    write_corpus(tmp_path, [BYTES.encode(PROSE)], tokenizer=BYTES)
    config = validate(small(data__valid=str(tmp_path)))
    model = make_model(NoMemory())
    [result] = run_tasks(model, config, BYTES, ["passkey"], [250], [0.0], 2, 0, segment_len=128)
    assert result.cells[0].n == 2


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["passkeys"], {}, "task 'passkeys' is unknown"),
        (["passkey"], {"lengths": ()}, "lengths="),
        (["passkey"], {"prompts": 1}, "prompts=1"),
        (["passkey", "pubmedqa"], {}, "PubMedQA's files"),
        (["passkey", "recall"], {"pairs": (3, 65)}, "pairs=65"),
        (["passkey"], {"depths": (2,)}, "depth=2"),
        (["passkey"], {"filler": None}, "no data.valid"),
        (["recall"], {"segment_len": 64, "lengths": (600,)}, "leave recall out"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(
    names: list[str], more: dict[str, Any], message: str
) -> None:
    reader = Copier(10)
    with pytest.raises(ValueError, match=message):
        run(names, reader, **more)
    assert reader.segments == 0


def test_a_foreign_tokenizer_is_refused() -> None:
    model = make_model(NoMemory(), vocab_size=100)
    with pytest.raises(ValueError, match="bytes has 257 ids, the model's vocab_size is 100"):
        run_tasks(model, validate(small()), BYTES, ["passkey"], [64], [0.0], 2, 0, filler=[PROSE])
