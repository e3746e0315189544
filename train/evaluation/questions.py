"""The question tasks of an evaluation: rates with intervals, and whether the memory is used.

Every task is asked with the memory, without it, and with another prompt's
(train.evaluation.answers). The verdict is over all prompts whose fact lies before the segment
of the question: the memory is used where it answers more of them than no memory and than another's
do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from data.index import Corpus
from data.tasks import (
    EXACT_TASKS,
    Filler,
    Grid,
    Prompt,
    PubMedQA,
    Unfit,
    check_task,
    corpus_texts,
    make_prompts,
    read_pubmedqa,
)
from data.tokenizer import Tokenizer
from model.decoder import Decoder
from train.evaluation.answers import (
    Answered,
    DecoderReader,
    Metered,
    PrepareBatch,
    Reader,
    lay_out,
    measure,
)
from train.evaluation.confidence import Share, Verdict, paired_difference, share, verdict
from train.reading.remote import open_remote
from train.settings.config import Config
from train.tracking.progress import short

PAIRS = (1, 4, 16, 64)
"""Of associative recall: how many codes a document holds."""


class Place(NamedTuple):
    """A cell of the grid that a task spans."""

    length: int  # tokens, a multiple of the segment's
    depth: float | None  # None where facts lie at random places
    pairs: int | None  # None where the task has one number of facts


@dataclass(frozen=True)
class Cell:
    """Prompts of one place in the grid, and the shares answered right."""

    length: int
    depth: float | None
    pairs: int | None
    n: int
    on: Share
    off: Share
    shuffled: Share

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        place = {"length": self.length, "depth": self.depth, "pairs": self.pairs, "n": self.n}
        shares = {"on": self.on, "off": self.off, "shuffled": self.shuffled}
        return place | {name: _plain(value) for name, value in shares.items()}


@dataclass(frozen=True)
class TaskResult:
    """What one task found."""

    task: str
    metric: str  # exact (every token of the answer) or choice (the likeliest of the choices)
    cells: tuple[Cell, ...]
    far: int  # prompts whose fact lies before the segment of the question
    on: Share  # right, over those
    off: Share
    shuffled: Share
    on_off: Share  # difference of shares right
    on_shuffled: Share
    verdict: Verdict
    state_bytes: int = 0  # the most that a stream carried on this rank
    tokens_per_s: float = math.nan  # of text, read in all conditions by all ranks together

    def to_json(self) -> dict[str, Any]:
        """Return plain values; null where a number is not finite."""
        return {
            "task": self.task,
            "metric": self.metric,
            "used": self.verdict,
            "far": self.far,
            "on": _plain(self.on),
            "off": _plain(self.off),
            "shuffled": _plain(self.shuffled),
            "on_off": _plain(self.on_off),
            "on_shuffled": _plain(self.on_shuffled),
            "state_bytes": self.state_bytes,
            "tokens_per_s": self.tokens_per_s if math.isfinite(self.tokens_per_s) else None,
            "cells": [cell.to_json() for cell in self.cells],
        }


def run_tasks(
    model: Decoder,
    config: Config,
    tokenizer: Tokenizer,
    names: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    prompts: int,
    seed: int,
    *,
    pairs: Sequence[int] = PAIRS,
    filler: Iterable[str] | None = None,
    pubmedqa: Path | None = None,
    segment_len: int | None = None,
    batch: int = 8,
    prepare_batch: PrepareBatch | None = None,
    reader: Reader | None = None,
    done: Callable[[int], object] = lambda prompts: None,
) -> list[TaskResult]:
    """Return what the tasks `names` (of data.tasks.TEXT_TASKS) find, in their order.

    prompts: of each length and depth (passkey, pubmedqa), length and number of pairs (recall) or
    length. lengths in tokens, rounded up to whole segments. filler: documents to hide facts in
    (None: those of data.valid). pubmedqa: the folder of its files. segment_len: text tokens a
    segment (None: data.segment_len; less where prepare_batch adds tokens). reader: reads in the
    model's stead. done hears how many of count_prompts are behind.

    Cells that cannot be asked are left out: facts longer than the length, a question longer than
    a segment, fewer than two questions of pubmedqa that fit. The model is whole on this process.
    Raises ValueError for what the user can mend, before anything is read.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model's vocab_size"
            f" is {model.config.vocab_size}; use the tokenizer that the run was prepared with"
        )
    questions = Questions(
        names,
        tokenizer,
        _valid_texts(config) if filler is None else lambda tokens: filler,
        lengths=lengths,
        depths=depths,
        prompts=prompts,
        seed=seed,
        pairs=pairs,
        segment_len=segment_len or config.data.segment_len,
        pubmedqa=pubmedqa,
    )
    return questions.ask(
        reader or DecoderReader(model), batch=batch, prepare_batch=prepare_batch, done=done
    )


class Questions:
    """Tasks that are known to fit, ready to be asked of any model, and as often as is wanted."""

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: Tokenizer,
        texts: Callable[[int], Iterable[str]],
        *,
        lengths: Sequence[int],
        depths: Sequence[float],
        prompts: int,
        seed: int,
        segment_len: int,
        pairs: Sequence[int] = PAIRS,
        pubmedqa: Path | None = None,
    ) -> None:
        """texts(tokens): documents to hide facts in, of each about so many tokens; see run_tasks.

        Raises ValueError for what the user can mend.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(
                f"lengths={list(lengths)} must be one or more numbers of tokens from 1 on"
            )
        if prompts < 2:
            raise ValueError(
                f"prompts={prompts}: shuffling memories needs at least 2 of each length"
            )
        rounded = sorted({-(-n // segment_len) * segment_len for n in lengths})
        self.names, self.tokenizer, self.segment_len = names, tokenizer, segment_len
        self.grid = Grid(rounded, sorted(set(depths)), sorted(set(pairs)), prompts, seed)
        self.pubmedqa: PubMedQA | None = read_pubmedqa(pubmedqa) if pubmedqa else None
        for name in names:
            check_task(name, self.grid, self.pubmedqa)
        longest = 2 * rounded[-1]
        self.filler = Filler.of(texts(longest), tokenizer.encode, longest)
        few = self.grid._replace(lengths=rounded[-1:], prompts=1)
        for name in names:  # at the greatest length at least something must fit
            for prompt in self._make(name, next(few.cells(name))):
                lay_out(prompt, tokenizer, segment_len)

    def ask(
        self,
        reader: Reader,
        *,
        batch: int = 8,
        prepare_batch: PrepareBatch | None = None,
        done: Callable[[int], object] = lambda prompts: None,
    ) -> list[TaskResult]:
        """Return what the tasks find, in their order; see run_tasks."""
        results = []
        for name in self.names:
            cells: list[tuple[Place, list[Answered]]] = []
            metered = Metered(reader, self.segment_len)
            for cell in self.grid.cells(name):
                with suppress(Unfit):
                    made = self._make(name, cell)
                    if len(made) > 1:
                        answers = measure(
                            metered,
                            made,
                            self.tokenizer,
                            segment_len=self.segment_len,
                            batch=batch,
                            prepare_batch=prepare_batch,
                        )
                        cells.append((Place(made[0].length, made[0].depth, made[0].pairs), answers))
                done(cell.prompts)
            found = summarise(name, cells)
            results.append(
                replace(found, state_bytes=metered.state_bytes, tokens_per_s=metered.tokens_per_s)
            )
        return results

    def _make(self, name: str, cell: Grid) -> list[Prompt]:
        return list(
            make_prompts(
                name, self.filler, cell, pubmedqa=self.pubmedqa, question_tokens=self.segment_len
            )
        )


def count_prompts(
    names: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    prompts: int,
    pairs: Sequence[int] = PAIRS,
) -> int:
    """Return how many prompts run_tasks asks, with those that do not fit."""
    return Grid(lengths, depths, pairs, prompts, 0).count(names)


def summarise(task: str, cells: Sequence[tuple[Place, Sequence[Answered]]]) -> TaskResult:
    """Return the result of a task from the answers in each of its cells."""
    if not cells:
        raise ValueError(f"no prompt of {task} fits: use greater lengths or a longer segment_len")
    far = [answer for _, answers in cells for answer in answers if answer.far]
    on, off, shuffled = _columns(far)
    differences = paired_difference(on, off), paired_difference(on, shuffled)
    return TaskResult(
        task=task,
        metric="exact" if task in EXACT_TASKS else "choice",
        cells=tuple(
            Cell(*place, len(answers), *(share(sum(c), len(c)) for c in _columns(answers)))
            for place, answers in cells
        ),
        far=len(far),
        on=share(sum(on), len(far)),
        off=share(sum(off), len(far)),
        shuffled=share(sum(shuffled), len(far)),
        on_off=differences[0],
        on_shuffled=differences[1],
        verdict=verdict(differences, len(far)),
    )


def describe(result: TaskResult) -> str:
    """Return the verdict, and what carrying the memory costs, in one line of words."""
    costs = f"; state {result.state_bytes:,} bytes a stream, {short(result.tokens_per_s)} tokens/s"
    words = _in_words(result)
    return words + costs if math.isfinite(result.tokens_per_s) else words


def _in_words(result: TaskResult) -> str:
    if result.far == 0:
        return f"{result.task}: every question had its fact in its own segment; use longer lengths"
    off, other = (
        f"{d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}]" for d in (result.on_off, result.on_shuffled)
    )
    return (
        f"{result.task}: memory used: {result.verdict} (right answers, on - off {off},"
        f" on - shuffled {other}, {result.far} prompts, 95 %)"
    )


def _columns(answers: Sequence[Answered]) -> tuple[list[bool], list[bool], list[bool]]:
    on, off, shuffled = ([answer[i] for answer in answers] for i in range(3))
    return on, off, shuffled


def _valid_texts(config: Config) -> Callable[[int], Iterable[str]]:
    if config.data.valid is None:
        raise ValueError("the run has no data.valid to hide facts in; name prepared shards or text")
    corpus = Corpus.open(config.data.valid, config.data.on_damage, open_remote(config))
    return lambda tokens: corpus_texts(corpus, tokens)


def _plain(value: Share) -> dict[str, float | None]:
    finite = value.value if value.value == value.value else None
    return {"value": finite, "low": value.low, "high": value.high}
