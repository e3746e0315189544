"""Blocks of the passkey task, drawn one at a time so that streams of any length can be made.

A key block holds `KEY d d d d` at a random place of its filler; a question block ends with
`QUERY d d d d`, and a prediction counts at each of these four digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.tasks import DIGITS, FILLER, KEY, KEY_DIGITS, QUERY


class Blocks:
    """A source of blocks of `length` tokens, int64, from one generator."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.generator = torch.Generator().manual_seed(seed)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Return uniform whole numbers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator)

    def normal(self, shape: torch.Size) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def filler(self, rows: int, blocks: int = 1) -> Tensor:
        """Return [rows, blocks, length] of filler."""
        return self.whole(0, FILLER, rows, blocks, self.length)

    def keys(self, rows: int) -> Tensor:
        """Return [rows, 4] digits, as tokens."""
        return self.whole(FILLER, FILLER + DIGITS, rows, KEY_DIGITS)

    def put_keys(self, blocks: Tensor, keys: Tensor, *, room: int | None = None) -> None:
        """Write `KEY d d d d` into blocks [rows, length], in the first `room` tokens (all)."""
        at = self.whole(0, (room or self.length) - KEY_DIGITS, len(blocks)).unsqueeze(1)
        marked = torch.cat((torch.full_like(keys[:, :1], KEY), keys), 1)
        blocks.scatter_(1, at + torch.arange(KEY_DIGITS + 1), marked)

    def questions(self, keys: Tensor) -> Tensor:
        """Return [rows, 1, length]: filler that ends with `QUERY d d d d`."""
        blocks = self.filler(len(keys))
        blocks[:, 0, -KEY_DIGITS:] = keys
        blocks[:, 0, -KEY_DIGITS - 1] = QUERY
        return blocks


def answers(logits: Tensor) -> Tensor:
    """Return the logits [rows, 4, V] of the digits, of a question block's [rows, length, V]."""
    return logits[:, -KEY_DIGITS - 1 : -1]
