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
from train.miniatures.states import num_bytes


class Cell(NamedTuple):
    """What came of the prompts of one length and place."""

    tokens: int
    place: str
    prompts: int
    exact: int  # prompts with all four digits right
    digits: int  # right digits, of 4 * prompts


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

    def ask(self, state: State, keys: Tensor) -> Tensor:
        """Return which digits [rows, 4] are right."""
        logits, _ = self.read(self.blocks.questions(keys), state)
        return grade(self.blocks.answers(logits), keys)[1]


def check(model: Decoder, miniature: Miniature, say: Say) -> Checked:
    """Return exact match and digits by length and place."""
    section, segment_len = miniature.check, miniature.segment_len
    result, counted = Checked(), dict[tuple[int, str], list[int]]()
    began = time.process_time()
    lengths = sorted(length // segment_len for length in section.lengths)
    with torch.inference_mode():
        for part, rows in enumerate(_parts(section)):
            blocks = Blocks(segment_len, section.seed + part, landmark_of(miniature))
            reader = Reader(model, blocks, rows, section.blocks_at_once)
            for count, place, right in _answers(reader, lengths, section, result):
                here = counted.setdefault((count * segment_len, place), [0, 0, 0])
                exact = int(right.all(-1).sum())
                for i, more in enumerate((rows, exact, int(right.sum()))):
                    here[i] += more
                seconds = time.process_time() - began
                say(f"{count * segment_len} {place}: {exact} of {rows}, {seconds:.0f} CPU s")
            result.tokens += reader.tokens
    result.seconds = time.process_time() - began
    result.cells = [Cell(*where, *numbers) for where, numbers in sorted(counted.items())]
    return result


def _answers(
    reader: Reader, lengths: list[int], section: CheckSection, result: Checked
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield (blocks, place, right digits) of every length and place."""
    if "start" in section.places:
        for count, state, keys in _from_start(reader, lengths):
            result.state_bytes[count * reader.blocks.length] = num_bytes(state) // reader.rows
            yield count, "start", reader.ask(state, keys)
    # The key-free stream stops before a length's middle block, and before its last but one.
    stops = [(count - 2, count, "end") for count in lengths if "end" in section.places]
    stops += [(count // 2, count, "middle") for count in lengths if "middle" in section.places]
    state, at = None, 0
    for stop, count, place in sorted(stops):
        state, at = reader.filler(state, stop - at), stop
        keys = reader.blocks.keys(reader.rows)
        after = reader.filler(reader.key(state, keys), count - stop - 2)
        yield count, place, reader.ask(after, keys)


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
