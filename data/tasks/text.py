"""The text tasks by name, and the prompts of one: a grid of lengths and depths or pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np

from data.tasks.filler import Filler
from data.tasks.needles import HOLDERS, passkey_prompt, recall_prompt
from data.tasks.prompt import Prompt
from data.tasks.pubmedqa import PubMedQA, distractors, pubmedqa_prompts
from data.tasks.stories import STORIES, story_prompt

PUBMEDQA = "pubmedqa"
TEXT_TASKS = ("passkey", "recall", *STORIES, PUBMEDQA)
"""What can be asked for; pubmedqa needs its files, the others any text."""
FACTS = "facts"
"""The name of all tasks of facts in stories together."""
EXACT_TASKS = ("passkey", "recall")
"""Those whose prompts have no choices: every token of the answer must be right."""


class Grid(NamedTuple):
    """Which prompts: `prompts` of each length and depth, of each length and number of pairs."""

    lengths: Sequence[int]  # tokens of document, question and answer
    depths: Sequence[float]  # passkey, pubmedqa: 0 (the document's begin) to 1
    pairs: Sequence[int]  # recall: 1 to 64
    prompts: int
    seed: int

    def cells(self, task: str) -> Iterator[Grid]:
        """Yield the grids of one length, and one depth or number of pairs, that a task spans."""
        for length in self.lengths:
            if task in ("passkey", PUBMEDQA):
                for depth in self.depths:
                    yield self._replace(lengths=(length,), depths=(depth,))
            elif task == "recall":
                for pairs in self.pairs:
                    yield self._replace(lengths=(length,), pairs=(pairs,))
            else:
                yield self._replace(lengths=(length,))

    def count(self, tasks: Sequence[str]) -> int:
        """Return how many prompts these tasks have, at most."""
        return sum(cell.prompts for task in tasks for cell in self.cells(task))


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
    Raises Unfit where a length is too short for the facts, ValueError as `check_task` does.
    """
    check_task(task, grid, pubmedqa)
    for cell in grid.cells(task):
        if task == PUBMEDQA:
            assert pubmedqa is not None
            yield from pubmedqa_prompts(
                _rng(cell.seed, task, cell.lengths[0], cell.depths[0]),
                pubmedqa.asked,
                distractors(pubmedqa, filler.encode),
                length=cell.lengths[0],
                depth=cell.depths[0],
                count=cell.prompts,
                question_tokens=question_tokens,
            )
        else:
            yield from (_make(task, filler, cell, number) for number in range(cell.prompts))


def task_names(given: Sequence[str]) -> list[str]:
    """Return the tasks of TEXT_TASKS that these names, FACTS among them, mean; each once."""
    return list(dict.fromkeys(n for name in given for n in (STORIES if name == FACTS else [name])))


def check_task(task: str, grid: Grid, pubmedqa: PubMedQA | None) -> None:
    """Raise ValueError for an unknown task, a value out of range, or absent files."""
    if task not in TEXT_TASKS:
        raise ValueError(f"task {task!r} is unknown; use one of {', '.join(TEXT_TASKS)}")
    if task == PUBMEDQA and pubmedqa is None:
        raise ValueError("task pubmedqa needs PubMedQA's files; name their folder")
    if outside := [depth for depth in grid.depths if not 0 <= depth <= 1]:
        raise ValueError(f"depth={outside[0]} is not between 0 (the document's begin) and 1")
    if outside := [pairs for pairs in grid.pairs if not 1 <= pairs <= len(HOLDERS)]:
        raise ValueError(f"pairs={outside[0]} is not between 1 and {len(HOLDERS)}")
    if next(grid.cells(task), None) is None:
        raise ValueError(f"task {task} has nothing to ask: give lengths, depths and pairs")


def _make(task: str, filler: Filler, cell: Grid, number: int) -> Prompt:
    length = cell.lengths[0]
    if task == "passkey":
        rng = _rng(cell.seed, task, length, cell.depths[0], number)
        return passkey_prompt(rng, filler, length=length, depth=cell.depths[0])
    if task == "recall":
        rng = _rng(cell.seed, task, length, cell.pairs[0], number)
        return recall_prompt(rng, filler, length=length, pairs=cell.pairs[0])
    rng = _rng(cell.seed, task, length, number)
    return story_prompt(rng, filler, task=task, length=length)


def _rng(seed: int, task: str, *place: float) -> np.random.Generator:
    # Of its own for each prompt: another length in the grid changes no other prompt.
    whole = [int(1000 * value) for value in place]
    return np.random.default_rng((seed, crc32(task.encode()), *whole))
