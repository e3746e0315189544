"""The text tasks by name, and the prompts of one: a grid of lengths and depths or pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np

from data.tasks.filler import Filler
from data.tasks.needles import passkey_prompt, recall_prompt
from data.tasks.prompt import Prompt
from data.tasks.pubmedqa import PubMedQA, distractors, pubmedqa_prompts
from data.tasks.stories import STORIES, story_prompt

PUBMEDQA = "pubmedqa"
TEXT_TASKS = ("passkey", "recall", *STORIES, PUBMEDQA)
"""What can be asked for; pubmedqa needs its files, the others any text."""
EXACT_TASKS = ("passkey", "recall")
"""Those whose prompts have no choices: every token of the answer must be right."""


class Grid(NamedTuple):
    """Which prompts: `prompts` of each length and depth, of each length and number of pairs."""

    lengths: Sequence[int]  # tokens of document, question and answer
    depths: Sequence[float]  # passkey, pubmedqa: 0 (the document's begin) to 1
    pairs: Sequence[int]  # recall: 1 to 64
    prompts: int
    seed: int


def make_prompts(
    task: str,
    filler: Filler,
    grid: Grid,
    *,
    pubmedqa: PubMedQA | None = None,
    question_tokens: int | None = None,
) -> Iterator[Prompt]:
    """Yield the prompts of a task, cell by cell.

    A prompt is a function of the filler and of (seed, task, length, depth or pairs, number)
    alone. question_tokens: questions of pubmedqa that take more, answer included, are left out.
    Raises ValueError for an unknown task, a length too short for the facts, absent files.
    """
    if task not in TEXT_TASKS:
        raise ValueError(f"task {task!r} is unknown; use one of {', '.join(TEXT_TASKS)}")
    if outside := [depth for depth in grid.depths if not 0 <= depth <= 1]:
        raise ValueError(f"depth={outside[0]} is not between 0 (the document's begin) and 1")
    if task == PUBMEDQA:
        if pubmedqa is None:
            raise ValueError("task pubmedqa needs PubMedQA's files; name their folder")
        yield from _ask_pubmedqa(filler, grid, pubmedqa, question_tokens)
        return
    second: Sequence[float] = (0,)
    if task in ("passkey", "recall"):
        second = grid.depths if task == "passkey" else grid.pairs
    for length in grid.lengths:
        for value in second:
            make = _maker(task, filler, length, value)
            for number in range(grid.prompts):
                yield make(_rng(grid.seed, task, length, value, number))


def _maker(
    task: str, filler: Filler, length: int, value: float
) -> Callable[[np.random.Generator], Prompt]:
    if task == "passkey":
        return lambda rng: passkey_prompt(rng, filler, length=length, depth=value)
    if task == "recall":
        return lambda rng: recall_prompt(rng, filler, length=length, pairs=int(value))
    return lambda rng: story_prompt(rng, filler, task=task, length=length)


def _ask_pubmedqa(
    filler: Filler, grid: Grid, data: PubMedQA, question_tokens: int | None
) -> Iterator[Prompt]:
    others = distractors(data, filler.encode)
    for length in grid.lengths:
        for depth in grid.depths:
            yield from pubmedqa_prompts(
                _rng(grid.seed, PUBMEDQA, length, depth),
                data.asked,
                others,
                length=length,
                depth=depth,
                count=grid.prompts,
                question_tokens=question_tokens,
            )


def _rng(seed: int, task: str, *place: float) -> np.random.Generator:
    # Of its own for each prompt: another length in the grid changes no other prompt.
    whole = [int(1000 * value) for value in place]
    return np.random.default_rng((seed, crc32(task.encode()), *whole))
