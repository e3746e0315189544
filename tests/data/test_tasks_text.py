"""Questions over text: the length is kept, facts lie where told, the answer is what was said."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.index import Corpus
from data.shards import write_corpus
from data.tasks import EXACT_TASKS, TEXT_TASKS, Filler, Grid, Prompt, corpus_texts, make_prompts
from data.tasks.filler import cut, hide
from data.tasks.pubmedqa import PubMedQA, Question, read_pubmedqa
from data.tasks.stories import NUMBERS, PEOPLE, PLACES, THINGS
from data.tokenizer import ByteTokenizer, Tokenizer, train_tokenizer

BYTES = ByteTokenizer()
_WORDS = "the of and a to in he was that it his her with as had she for on".split()


def prose(seed: int = 0, sentences: int = 400) -> str:
    """Return sentences of 3 to 30 words, some with line breaks, as a book has them."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(sentences):
        words = rng.choice(_WORDS, int(rng.integers(3, 30))).tolist()
        gap = "\n" if rng.random() < 0.3 else " "
        made.append(" ".join(words[:2]).capitalize() + gap + " ".join(words[2:]) + ".")
    return " ".join(made)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer([prose(1)], vocab_size=400)


PUBMEDQA = PubMedQA(
    [Question(f"Does drug {i} help?", f"We gave drug {i} to mice.", "maybe") for i in range(9)],
    [f"Abstract {i} tells of {' '.join(['cells'] * (5 + i))}." for i in range(20)],
)


def prompts(task: str, tokenizer: Tokenizer = BYTES, **more: Any) -> list[Prompt]:
    values: dict[str, Any] = {
        "lengths": (800, 1600), "depths": (0.0, 0.5, 1.0), "pairs": (1, 7), "prompts": 4, "seed": 3,
    }  # fmt: skip
    filler = Filler.of([prose()], tokenizer.encode)
    return list(make_prompts(task, filler, Grid(**values | more), pubmedqa=PUBMEDQA))


def size(prompt: Prompt, tokenizer: Tokenizer) -> int:
    parts = (prompt.document, prompt.question, max(prompt.candidates, key=len))
    return sum(len(tokenizer.encode(part)) for part in parts)


@pytest.mark.parametrize("task", TEXT_TASKS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_prompt_fills_its_length_but_for_a_word(task: str, trained: bool, bpe: Tokenizer) -> None:
    tokenizer = bpe if trained else BYTES
    for prompt in prompts(task, tokenizer):
        assert 0 <= prompt.length - size(prompt, tokenizer) <= 12
        assert prompt.question[0].isspace() and all(c[0] == " " for c in prompt.candidates)
        assert prompt.answer in prompt.candidates
        assert (prompt.choices is None) == (task in EXACT_TASKS)


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_the_needed_facts_begin_where_told(task: str) -> None:
    begins = (
        "The passkey is", "The code of", "We gave drug", *(f"{person} " for person in PEOPLE)
    )  # fmt: skip
    for prompt in prompts(task):
        assert prompt.gold
        for start in prompt.gold:
            text = BYTES.decode(BYTES.encode(prompt.document)[start:])
            assert text.lstrip().startswith(begins)


def test_depth_is_a_share_of_the_document() -> None:
    fact = len(" The passkey is 12345. Remember it: 12345 is the passkey.")
    found = {(p.depth, p.gold[0] / (len(p.document) - fact)) for p in prompts("passkey")}
    assert {share for depth, share in found if depth == 0} == {0}
    # At the end of the sentence that lies there; one has at most 30 words of 5 characters.
    assert all(0.495 <= share < 0.75 for depth, share in found if depth == 0.5)
    for prompt in prompts("passkey", depths=(1.0,)):
        assert prompt.document.endswith("is the passkey.")


def test_the_passkey_is_said_once_and_asked_for() -> None:
    for prompt in prompts("passkey"):
        [key] = re.findall(r"The passkey is (\d{5})\.", prompt.document)
        assert prompt.answer == f" {key}"
    assert len({prompt.answer for prompt in prompts("passkey")}) == 24


@pytest.mark.parametrize("task", ["passkey", "recall", "story_thing"])
def test_facts_added_are_all_that_differs_from_the_text(task: str) -> None:
    """What is left without them is text in its own order, white space and all."""
    text = "\n\n" + prose()
    for prompt in prompts(task):
        told = r" ?The passkey is \d+\. Remember it: \d+ is the passkey\.| ?The code of the .*?\."
        told += rf"| ?({'|'.join(PEOPLE)}) [^.]*?\."
        rest = re.sub(told, "", prompt.document, flags=re.DOTALL)
        assert rest in text + text and len(rest) > 200


def test_recall_asks_for_the_last_code_of_a_name() -> None:
    for prompt in prompts("recall"):
        codes = re.findall(r"The code of the (\w+ \w+) is (\d+)\.", prompt.document)
        asked = re.findall(r"The code of the (\w+ \w+) is$", prompt.question)[0]
        assert len(codes) == prompt.pairs == len(dict(codes))
        assert prompt.answer == f" {dict(codes)[asked]}"


def test_recall_overwrites() -> None:
    from data.tasks.needles import recall_prompt

    filler = Filler.of([prose()], BYTES.encode)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        prompt = recall_prompt(rng, filler, length=1500, pairs=4, overwrites=3)
        codes = re.findall(r"The code of the (\w+ \w+) is (\d+)\.", prompt.document)
        asked = re.findall(r"The code of the (\w+ \w+) is$", prompt.question)[0]
        given = [code for name, code in codes if name == asked]
        assert len(codes) == 7 and len(given) > 1 and prompt.answer == f" {given[-1]}"
        assert prompt.document[prompt.gold[0] :].lstrip().startswith(f"The code of the {asked}")


_MOVE, _TAKE = r"walked to|went over to|headed for|returned to", r"picked up|took|got hold of"
_DROP = r"put down|left behind|let go of"


class Reader:
    """Reads a story as a person would: the twin of the generator, from its text alone."""

    def __init__(self, document: str) -> None:
        self.place: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.lying: dict[str, str] = {}
        told = rf"({'|'.join(PEOPLE)}) ({_MOVE}|{_TAKE}|{_DROP}) the (\w+)\."
        for who, verb, what in re.findall(told, document):
            if re.fullmatch(_MOVE, verb):
                self.place[who] = what
            elif re.fullmatch(_TAKE, verb):
                assert what not in self.holder, "taken from another's hands"
                assert self.lying.pop(what, self.place[who]) == self.place[who], "out of reach"
                self.holder[what] = who
            else:
                assert self.holder.pop(what) == who
                self.lying[what] = self.place[who]

    def answer(self, question: str) -> str:
        words = set(re.findall(r"\w+", question))
        who = next((person for person in PEOPLE if person in words), "")
        if "many" in words:
            return NUMBERS[list(self.holder.values()).count(who)]
        if "Is" in words:
            return "yes" if self.place[who] in words else "no"
        if who:
            return self.place[who]
        thing = next(thing for thing in THINGS if thing in words)
        return self.place[self.holder[thing]] if thing in self.holder else self.lying[thing]


@pytest.mark.parametrize("task", ["story_person", "story_thing", "story_yes_no", "story_count"])
def test_a_reader_of_the_story_finds_the_answer(task: str) -> None:
    found = prompts(task, prompts=40)
    for prompt in found:
        assert prompt.answer == " " + Reader(prompt.document).answer(prompt.question)
    answers = {prompt.answer.strip() for prompt in found}
    assert answers <= {*PLACES, *NUMBERS, "yes", "no"}
    assert len(answers) >= {"story_yes_no": 2, "story_count": 3}.get(task, 6)


def test_a_prompt_does_not_depend_on_the_rest_of_the_grid() -> None:
    few = prompts("passkey", lengths=(1600,), depths=(0.5,), prompts=2)
    assert set(few) < set(prompts("passkey"))
    assert set(prompts("passkey", seed=4)).isdisjoint(prompts("passkey"))


def test_pubmedqa_hides_an_abstract_among_the_others() -> None:
    for prompt in prompts("pubmedqa"):
        drug = re.findall(r"drug \d", prompt.question)[0]
        assert prompt.document.count("We gave") == prompt.document.count(drug) == 1
        assert "Abstract" in prompt.document and prompt.choices == (" yes", " no", " maybe")


def test_pubmedqa_leaves_out_what_does_not_fit() -> None:
    filler = Filler.of([prose()], BYTES.encode)
    grid = Grid((200,), (0.5,), (), 4, 0)
    made = make_prompts("pubmedqa", filler, grid, pubmedqa=PUBMEDQA, question_tokens=20)
    assert list(made) == []


def write_pubmedqa(folder: Path, test: list[str]) -> None:
    entry = {"QUESTION": "Why?", "CONTEXTS": ["One.", "Two."], "final_decision": "no"}
    (folder / "ori_pqal.json").write_text(json.dumps({"1": entry, "2": entry}))
    (folder / "test_ground_truth.json").write_text(json.dumps(dict.fromkeys(test, "no")))


def test_pubmedqa_reads_the_published_files(tmp_path: Path) -> None:
    write_pubmedqa(tmp_path, ["2"])
    found = read_pubmedqa(tmp_path)
    assert found == PubMedQA([Question("Why?", "One. Two.", "no")], ["One. Two."])
    write_pubmedqa(tmp_path, ["1", "2"])
    with pytest.raises(ValueError, match="2 of 2 questions"):
        read_pubmedqa(tmp_path)
    (tmp_path / "ori_pqal.json").write_text('{"1": {"QUESTION": "Why?"}}')
    with pytest.raises(ValueError, match="entry 1 has no 'CONTEXTS'"):
        read_pubmedqa(tmp_path)
    with pytest.raises(ValueError, match=r"ori_pqal.json cannot be read"):
        read_pubmedqa(tmp_path / "none")


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("pass", {}, "task 'pass' is unknown; use one of passkey, recall"),
        ("passkey", {"lengths": (40,)}, "length=40 tokens do not hold the question"),
        ("recall", {"lengths": (100,), "pairs": (4,)}, "4 facts take"),
        ("recall", {"pairs": (65,)}, "pairs=65"),
        ("passkey", {"depths": (1.5,)}, "depth=1.5"),
    ],
)
def test_what_cannot_be_asked_is_refused(task: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompts(task, **more)


def test_cutting_loses_nothing() -> None:
    text = prose() + "\n\nA table " + "x" * 900 + "\n" + "y z " * 300 + "“Really?” he said.  \n"
    pieces = list(cut(text))
    assert "".join(pieces) == text.rstrip()
    assert max(map(len, pieces)) <= 400
    assert all(piece.strip() for piece in pieces)


def test_a_short_text_repeats_and_no_text_is_refused() -> None:
    filler = Filler.of(["One two. Three."], BYTES.encode)
    hidden = hide(np.random.default_rng(0), filler, [" Fact."], [0.5], 200, [0])
    assert hidden.document.count("Three.") > 5 and 188 <= hidden.tokens <= 200
    with pytest.raises(ValueError, match="no filler text"):
        Filler.of(["", " \n"], BYTES.encode)


def test_filler_reads_no_more_than_it_needs() -> None:
    def endless() -> Any:
        while True:
            yield prose()

    filler = Filler.of(endless(), BYTES.encode, tokens=1000)
    assert 1000 <= sum(filler.counts) < 1400


def test_a_corpus_gives_its_documents_as_text(tmp_path: Path) -> None:
    texts = [prose(seed, 20) for seed in range(3)]
    write_corpus(tmp_path, [BYTES.encode(text) for text in texts], tokenizer=BYTES)
    corpus = Corpus.open(tmp_path)
    assert sorted(corpus_texts(corpus, 10**6)) == sorted(texts)
    assert {len(text) for text in corpus_texts(corpus, 100)} == {100}
