"""What a question about a long document is, for any model that reads text."""

from __future__ import annotations

from typing import NamedTuple

from data.tasks.filler import Encode, Unfit


class Prompt(NamedTuple):
    """Read document, then question; the answer follows.

    question and answer begin with the white space that separates them, and are tokenised apart
    from what precedes them.
    """

    task: str
    document: str
    question: str
    answer: str
    choices: tuple[str, ...] | None
    """Answers of which the likeliest counts, `answer` among them; None: the very tokens."""
    length: int
    """Tokens aimed at, of document, question and longest choice: never more, less by a word."""
    depth: float | None
    """Where in the document the fact lies, 0 (first) to 1; None: at random places."""
    pairs: int | None
    """Facts of the answer's kind in the document, where a task varies them."""
    gold: tuple[int, ...]
    """The index in the document of the first token of each fact that the answer needs."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """The choices, or the answer alone."""
        return self.choices or (self.answer,)


def question_size(encode: Encode, question: str, candidates: tuple[str, ...]) -> int:
    """Return the tokens of the question and the longest of its answers."""
    return len(encode(question)) + max(len(encode(choice)) for choice in candidates)


def room_for(encode: Encode, length: int, question: str, candidates: tuple[str, ...]) -> int:
    """Return the tokens that are left for the document; Unfit if there are none."""
    size = question_size(encode, question, candidates)
    if size >= length:
        raise Unfit(
            f"length={length} tokens do not hold the question and its answer ({size}); use a"
            f" greater length"
        )
    return length - size
