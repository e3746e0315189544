"""Which documents are held out: decided by their text, so copies never end on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Side = Literal["train", "valid"]
_RANGE = 1 << 64


@dataclass(frozen=True)
class Split:
    """Sends a document to "train" or "valid" by a seeded hash of its text.

    `moved` is the one text that goes to the other side, where a small corpus would have
    left one side without any document.
    """

    seed: int
    valid_fraction: float
    moved: bytes | None = None

    def identity(self, text: str) -> bytes:
        """Return the 16 bytes that stand for this text."""
        salt = self.seed.to_bytes(16, "little")
        return hashlib.blake2b(text.encode(), digest_size=16, salt=salt).digest()

    def side(self, identity: bytes) -> Side:
        """Return the side of the document with this identity."""
        held_out = _fraction(identity) < self.valid_fraction
        return "valid" if held_out != (identity == self.moved) else "train"


def choose_split(texts: Iterable[str], *, seed: int, valid_fraction: float) -> Split:
    """Return the split, with at least one document on each side if valid_fraction > 0.

    Reads `texts` only until both sides have one: about 1 / valid_fraction documents.
    """
    split = Split(seed, valid_fraction)
    if valid_fraction == 0:
        return split
    sides: set[Side] = set()
    extremes: list[bytes] = []
    for text in texts:
        if not text.strip():
            continue
        identity = split.identity(text)
        sides.add(split.side(identity))
        if len(sides) == 2:
            return split
        ordered = sorted({*extremes, identity}, key=_fraction)
        extremes = [ordered[0], ordered[-1]]
    if len(set(extremes)) < 2:
        raise ValueError(
            f"valid_fraction={valid_fraction} needs 2 different documents or more, the inputs"
            f" hold {len(set(extremes))}; set --valid-fraction 0, or add documents"
        )
    lowest, highest = extremes
    return replace(split, moved=lowest if split.side(lowest) == "train" else highest)


def _fraction(identity: bytes) -> float:
    return int.from_bytes(identity[:8], "little") / _RANGE
