"""Passkeys: four digits far back, asked for at the end (Mohtashami & Jaggi 2023, in small)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from data.tasks.symbols import (
    DIGITS,
    FILLER,
    KEY,
    QUERY,
    Int64Array,
    TokenTask,
    ask,
    fill,
    name_rows,
    require_room,
    slots_of,
    write,
)

PASSKEY_VOCAB = 32
"""Of one key without a name; of several, symbols.vocab_size(names)."""
KEY_DIGITS = 4

Position = Literal["start", "middle", "end"]


def passkeys(
    rng: np.random.Generator, *, batch: int, segments: int, segment_len: int, distance: int
) -> TokenTask:
    """Return documents that end with QUERY d d d d, the key KEY d d d d `distance` segments before.

    Filler is iid; the key lies at a random place of segment segments - 1 - distance, all of it.
    distance 0 puts key and question in one segment.
    """
    if not 0 <= distance < segments:
        raise ValueError(f"distance={distance} needs 0 <= distance < segments={segments}")
    length = KEY_DIGITS + 1
    room = segment_len - length - (length if distance == 0 else 0)
    if room < 0:
        raise ValueError(f"segment_len={segment_len} is too short; use at least {2 * length}")
    tokens = fill(rng, batch, segments, segment_len)
    digits = _digits(rng, batch, 1)[:, 0]
    at = rng.integers(0, room + 1, batch)
    rows = np.arange(batch)
    segment = segments - 1 - distance
    for offset, column in enumerate([np.full(batch, KEY), *digits.T]):
        tokens[rows, segment, at + offset] = column
    return ask(tokens, np.full((batch, 1), QUERY), digits, np.full(batch, segment))


def passkeys_at(
    rng: np.random.Generator,
    *,
    batch: int,
    segments: int,
    segment_len: int,
    position: Position,
    keys: int = 1,
    names: int = 0,
) -> TokenTask:
    """Return documents whose asked key lies in segment 0, in the middle, or before the question.

    names=0: one key, KEY d d d d. Otherwise each of `keys` keys is KEY name d d d d, their
    names drawn from `names`, the others at random places of any segment before the question's,
    and QUERY name d d d d asks for one.
    """
    if names == 0 and keys != 1:
        raise ValueError(f"keys={keys} without names cannot be told apart; set names={keys}")
    width = KEY_DIGITS + 1 + (names > 0)
    require_room(segment_len, 2 * width, segments)
    asked = {"start": 0, "middle": (segments - 1) // 2, "end": segments - 2}[position]
    tokens = fill(rng, batch, segments, segment_len)
    digits = _digits(rng, batch, keys)
    marks = np.full((batch, keys, 1), KEY)
    question = np.full((batch, 1), QUERY)
    if names:
        named = name_rows(rng, batch, names, keys)
        marks = np.concatenate([marks, named[:, :, None]], 2)
        question = np.concatenate([question, named[:, :1]], 1)
    facts = np.concatenate([marks, digits], 2)
    places = _slots_with(rng, batch, segments - 1, slots_of(segment_len, width), keys, asked)
    write(rng, tokens, places, facts)
    return ask(tokens, question, digits[:, 0], np.full(batch, asked))


def _digits(rng: np.random.Generator, batch: int, keys: int) -> Int64Array:
    return rng.integers(FILLER, FILLER + DIGITS, (batch, keys, KEY_DIGITS))


def _slots_with(
    rng: np.random.Generator, batch: int, segments: int, slots: int, count: int, first: int
) -> Int64Array:
    """Return [B, count] different slots, the first of each row in segment `first`."""
    if count > segments * slots:
        raise ValueError(
            f"keys={count} do not fit into {segments} segments of {slots} places each; use fewer"
            f" keys or more segments"
        )
    asked = first * slots + rng.integers(0, slots, batch)
    scores = rng.random((batch, segments * slots))
    scores[np.arange(batch), asked] = -1.0  # drawn before all others
    return np.argsort(scores, axis=1)[:, :count]
