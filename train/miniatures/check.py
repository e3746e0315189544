"""The streaming check: block by block, constant state, one stream for all lengths.

A document of N blocks is the key's block (the first, the middle one, or the one before the
question), filler, and the question. States are values, so a length is a fork: the question is read
on a copy, whose update is dropped; so is the key's block at `end` and `middle`, for which the
stream itself stays free of keys. Reading to the longest length thus serves all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model.decoder import Decoder
from model.memory.base import State
from train.miniatures.blocks import Blocks
from train.miniatures.config import CheckSection, Miniature, landmark_of
from train.miniatures.learner import grade, read
from train.miniatures.progress import Say
from train.miniatures.retrieval import found, retrieves
from train.miniatures.states import num_bytes


class Cell(NamedTuple):
    """What came of the prompts of one length and place."""

    tokens: int
    place: str
    prompts: int
    exact: int  # prompts with all four digits right
    digits: int  # right digits, of 4 * prompts
    found: int | None = None  # of the 4 * prompts tokens that read digits: a head found the key
    found_by_heads: float | None = None  # share of heads, over these tokens, that found it


@dataclass
class Checked:
    """A whole check."""

    cells: list[Cell] = field(default_factory=list)
    state_bytes: dict[int, int] = field(default_factory=dict)  # of one stream, by tokens read
    tokens: int = 0  # read, over all streams
    seconds: float = 0.0  # CPU time

    @property
    def tokens_per_s(self) -> float:
        """Tokens read in a CPU second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Answer(NamedTuple):
    """What came of one question in each row."""

    right: Tensor  # [rows, 4] bool: digits
    found: Tensor | None  # [rows, heads, 4] bool: retrieval chose the key's block


class Tally:
    """What has been counted for one length and place."""

    def __init__(self) -> None:
        self.prompts = self.exact = self.digits = self.found = 0
        self.reads: list[Tensor] = []

    def add(self, answer: Answer) -> int:
        """Count the rows of an answer; return how many are right."""
        exact = int(answer.right.all(-1).sum())
        self.prompts += len(answer.right)
        self.exact += exact
        self.digits += int(answer.right.sum())
        if answer.found is not None:
            self.found += int(answer.found.any(1).sum())
            self.reads.append(answer.found.float().flatten())
        return exact

    def cell(self, tokens: int, place: str) -> Cell:
        """Return the result."""
        counts = (tokens, place, self.prompts, self.exact, self.digits)
        if not self.reads:
            return Cell(*counts)
        return Cell(*counts, self.found, round(torch.cat(self.reads).mean().item(), 4))


class Reader:
    """Streams of one model, side by side."""

    def __init__(self, model: Decoder, blocks: Blocks, rows: int, at_once: int) -> None:
        self.model, self.blocks, self.rows, self.at_once = model, blocks, rows, at_once
        self.tokens = 0

    def read(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Read blocks [rows, N, S]."""
        self.tokens += tokens.numel()
        return read(self.model, tokens, state)

    def remember(self, tokens: Tensor, state: State) -> State:
        """Return the state after blocks [rows, N, S]."""
        self.tokens += tokens.numel()
        starts = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        return self.model.read(tokens, starts, state)

    def filler(self, state: State, count: int) -> State:
        """Return the state after `count` blocks of filler."""
        while count > 0:
            now = min(count, self.at_once)
            state = self.remember(self.blocks.filler(self.rows, now), state)
            count -= now
        return state

    def key(self, state: State, keys: Tensor) -> State:
        """Return the state after a block with the key."""
        tokens = self.blocks.filler(self.rows)
        self.blocks.put_keys(tokens[:, 0], keys)
        return self.remember(tokens, state)

    def ask(self, state: State, keys: Tensor, key_block: int) -> Answer:
        """Return what came of the question; key_block: the key's, counted from the first."""
        question = self.blocks.questions(keys)
        hits = None
        if retrieves(self.model):
            hits = found(self.model, self.blocks, question, state, key_block)
        logits, _ = self.read(question, state)
        return Answer(grade(self.blocks.answers(logits), keys)[1], hits)


def check(model: Decoder, miniature: Miniature, say: Say) -> Checked:
    """Return exact match and digits by length and place."""
    section, segment_len = miniature.check, miniature.segment_len
    result, tallies = Checked(), dict[tuple[int, str], Tally]()
    began = time.process_time()
    lengths = sorted(length // segment_len for length in section.lengths)
    with torch.inference_mode():
        for part, rows in enumerate(_parts(section)):
            blocks = Blocks(segment_len, section.seed + part, landmark_of(miniature))
            reader = Reader(model, blocks, rows, section.blocks_at_once)
            for count, place, answer in _answers(reader, lengths, section, result):
                tally = tallies.setdefault((count * segment_len, place), Tally())
                exact = tally.add(answer)
                seconds = time.process_time() - began
                say(f"{count * segment_len} {place}: {exact} of {rows}, {seconds:.0f} CPU s")
            result.tokens += reader.tokens
    result.seconds = time.process_time() - began
    result.cells = [tally.cell(*where) for where, tally in sorted(tallies.items())]
    return result


def _answers(
    reader: Reader, lengths: list[int], section: CheckSection, result: Checked
) -> Iterator[tuple[int, str, Answer]]:
    """Yield (blocks, place, answer) of every length and place."""
    if "start" in section.places:
        for count, state, keys in _from_start(reader, lengths):
            result.state_bytes[count * reader.blocks.length] = num_bytes(state) // reader.rows
            yield count, "start", reader.ask(state, keys, 0)
    # The key-free stream stops before a length's middle block, and before its last but one.
    stops = [(count - 2, count, "end") for count in lengths if "end" in section.places]
    stops += [(count // 2, count, "middle") for count in lengths if "middle" in section.places]
    state, at = None, 0
    for stop, count, place in sorted(stops):
        state, at = reader.filler(state, stop - at), stop
        keys = reader.blocks.keys(reader.rows)
        after = reader.filler(reader.key(state, keys), count - stop - 2)
        yield count, place, reader.ask(after, keys, stop)


def _from_start(reader: Reader, lengths: list[int]) -> Iterator[tuple[int, State, Tensor]]:
    """Yield (blocks, state before the question, keys) for each length, key in the first block."""
    keys = reader.blocks.keys(reader.rows)
    state, at = reader.key(None, keys), 1
    for count in lengths:
        state, at = reader.filler(state, count - 1 - at), count - 1
        yield count, state, keys


def _parts(section: CheckSection) -> list[int]:
    """Return how many prompts are read side by side, one part after the other."""
    size = section.prompts_at_once or section.prompts
    return [min(size, section.prompts - i) for i in range(0, section.prompts, size)]
