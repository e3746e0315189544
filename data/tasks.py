"""Synthetic tasks whose answer lies far back: does the model use what it carries?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FILLER = 20
"""Filler symbols 0 .. 19; then digits, then the two markers."""
DIGITS = 10
KEY, QUERY = FILLER + DIGITS, FILLER + DIGITS + 1
PASSKEY_VOCAB = 32
KEY_DIGITS = 4
IGNORE = -100


class Passkeys(NamedTuple):
    """A batch of passkey documents of N segments of S tokens."""

    tokens: NDArray[np.int64]  # [B, N, S]
    labels: NDArray[np.int64]  # [B, N, S], the digits after QUERY; IGNORE elsewhere


def passkeys(
    rng: np.random.Generator, *, batch: int, segments: int, segment_len: int, distance: int
) -> Passkeys:
    """Return documents that end with QUERY d d d d, the key KEY d d d d `distance` segments before.

    Filler is iid; the key lies at a random place of segment segments - 1 - distance, all of it.
    distance 0 puts key and question in one segment. (Mohtashami & Jaggi 2023, in small.)
    """
    if not 0 <= distance < segments:
        raise ValueError(f"distance={distance} needs 0 <= distance < segments={segments}")
    length = KEY_DIGITS + 1
    room = segment_len - length - (length if distance == 0 else 0)
    if room < 0:
        raise ValueError(f"segment_len={segment_len} is too short; use at least {2 * length}")
    tokens = rng.integers(0, FILLER, (batch, segments, segment_len))
    digits = rng.integers(FILLER, FILLER + DIGITS, (batch, KEY_DIGITS))
    at = rng.integers(0, room + 1, batch)
    rows = np.arange(batch)
    for offset, column in enumerate([np.full(batch, KEY), *digits.T]):
        tokens[rows, segments - 1 - distance, at + offset] = column
    tokens[:, -1, -length] = QUERY
    tokens[:, -1, -KEY_DIGITS:] = digits
    labels = np.full_like(tokens, IGNORE)
    labels[:, -1, -length:-1] = digits
    return Passkeys(tokens, labels)
