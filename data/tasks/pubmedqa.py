"""PubMedQA (Jin et al. 2019): yes, no or maybe from an abstract, here among many others.

The folder holds the published files ori_pqal.json (1,000 labelled questions with their abstracts)
and test_ground_truth.json (the 500 ids that nobody trains on). Those 500 are asked; the other
500 abstracts are what lies around.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.tasks.filler import Encode, Filler, hide
from data.tasks.prompt import Prompt, question_size

QUESTIONS, TEST_IDS = "ori_pqal.json", "test_ground_truth.json"
CHOICES = (" yes", " no", " maybe")


class Question(NamedTuple):
    """A question, the abstract without its conclusion, and the answer."""

    text: str
    abstract: str
    answer: str  # yes, no, maybe


class PubMedQA(NamedTuple):
    """What is asked, and abstracts of other questions."""

    asked: list[Question]
    others: list[str]


def read_pubmedqa(folder: Path) -> PubMedQA:
    """Return the test questions and the abstracts of all others; ValueError if it is not there."""
    labelled, test = _read(folder / QUESTIONS), _read(folder / TEST_IDS)
    asked, others = [], []
    for number, entry in labelled.items():
        try:
            abstract = " ".join(entry["CONTEXTS"])
            question = Question(entry["QUESTION"], abstract, entry["final_decision"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / QUESTIONS}: entry {number} has no {error}; use the published file"
            ) from error
        if number in test:
            asked.append(question)
        else:
            others.append(question.abstract)
    if not asked or not others:
        raise ValueError(
            f"{folder}: {len(asked)} of {len(labelled)} questions are in {TEST_IDS}; some must be,"
            f" and some must not (they are the other text): use the published files"
        )
    return PubMedQA(asked, others)


def distractors(data: PubMedQA, encode: Encode) -> Filler:
    """Return the other abstracts as filler, one piece each."""
    return Filler([f"\n\n{abstract}" for abstract in data.others], encode)


def pubmedqa_prompts(
    rng: np.random.Generator,
    asked: Sequence[Question],
    filler: Filler,
    *,
    length: int,
    depth: float,
    count: int,
    question_tokens: int | None = None,
) -> Iterator[Prompt]:
    """Yield `count` prompts, or fewer, of questions whose abstract fits into `length`.

    question_tokens: leave out those whose question and answer take more.
    """
    limit = length if question_tokens is None else question_tokens
    for number in rng.permutation(len(asked)).tolist():
        if count == 0:
            return
        text, abstract, answer = asked[number]
        question = f"\n\nQuestion: {text} Answer (yes, no or maybe):"
        fact = f"\n\n{abstract}"
        size = question_size(filler.encode, question, CHOICES)
        if size > min(limit, length - len(filler.encode(fact))):
            continue
        count -= 1
        hidden = hide(rng, filler, [fact], [depth], length - size, [0])
        yield Prompt(
            "pubmedqa", hidden.document, question, f" {answer}", CHOICES, length, depth, None,
            hidden.starts,
        )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); name the folder of PubMedQA's {QUESTIONS} and"
            f" {TEST_IDS}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not questions by their id")
    return content
