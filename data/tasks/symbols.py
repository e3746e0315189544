"""The small vocabulary of the token-level tasks, and how their segments are filled.

0 .. 19 filler, 20 .. 29 digits, KEY, QUERY, 32 .. 63 values, from 64 on names: a task without
names needs only 32 or 64 embeddings.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.streams import IGNORE

Int64Array = NDArray[np.int64]

FILLER = 20
"""Filler symbols 0 .. 19; then digits, then the two markers."""
DIGITS = 10
KEY, QUERY = FILLER + DIGITS, FILLER + DIGITS + 1
FIRST_VALUE, VALUES = 32, 32
FIRST_NAME = FIRST_VALUE + VALUES
PASSKEY_VOCAB = FIRST_VALUE
"""Of one key of KEY_DIGITS digits, without a name."""
KEY_DIGITS = 4


class TokenTask(NamedTuple):
    """A batch of documents of N segments of S tokens; the question ends the last segment."""

    tokens: Int64Array  # [B, N, S]
    labels: Int64Array  # [B, N, S], the answer's tokens after the question; IGNORE elsewhere
    gold: Int64Array  # [B], the segment that holds what is asked for, as last written


def vocab_size(names: int) -> int:
    """Return the vocabulary of the tasks that tell keys apart by `names` different names."""
    return FIRST_NAME + names


def fill(rng: np.random.Generator, batch: int, segments: int, segment_len: int) -> Int64Array:
    """Return [B, N, S] of filler, iid."""
    return rng.integers(0, FILLER, (batch, segments, segment_len))


def slots_of(segment_len: int, width: int) -> int:
    """Return how many facts of `width` tokens `write` can place in a segment."""
    return (segment_len - width + 1) // width


def write(
    rng: np.random.Generator, tokens: Int64Array, places: Int64Array, facts: Int64Array
) -> None:
    """Write facts [B, W, L] into tokens [B, N, S] at slots [B, W], different ones in a row.

    Slot i is place i % slots of segment i // slots; each segment shifts its slots by 0 .. L-1.
    """
    batch, segments, segment_len = tokens.shape
    width = facts.shape[2]
    slots = slots_of(segment_len, width)
    shift = rng.integers(0, width, (batch, segments))
    rows = np.arange(batch)[:, None]
    segment, place = places // slots, places % slots
    begin = place * width + shift[rows, segment]
    for offset in range(width):
        tokens[rows, segment, begin + offset] = facts[:, :, offset]


def ask(
    tokens: Int64Array, question: Int64Array, answer: Int64Array, gold: Int64Array
) -> TokenTask:
    """Return the task: question [B, Q] and answer [B, A] written at the end of tokens."""
    length = answer.shape[1]
    tokens[:, -1, -length:] = answer
    tokens[:, -1, -length - question.shape[1] : -length] = question
    labels = np.full_like(tokens, IGNORE)
    labels[:, -1, -length - 1 : -1] = answer
    return TokenTask(tokens, labels, gold)


def name_rows(rng: np.random.Generator, batch: int, names: int, count: int) -> Int64Array:
    """Return [B, count] different names in random order."""
    if not 1 <= count <= names:
        raise ValueError(f"{count} keys need as many names, there are {names}; use names={count}")
    order = np.argsort(rng.random((batch, names)), axis=1)[:, :count]
    return FIRST_NAME + order


def require_room(segment_len: int, length: int, segments: int) -> None:
    """Raise ValueError where a fact has no segment before the question's, or does not fit."""
    if segments < 2:
        raise ValueError(
            f"segments={segments}: the fact and the question take one each; use 2 or more"
        )
    if segment_len < length:
        raise ValueError(f"segment_len={segment_len} is too short; use at least {length}")
