"""Blocks of the passkey task, drawn one at a time so that streams of any length can be made.

A key block holds `KEY d d d d` at a random place of its filler; a question block ends with
`QUERY d d d d`, and a prediction counts at each of these four digits. Where the memory has
landmarks, the last token of every block is one, and what was said holds for the tokens before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.tasks import DIGITS, FILLER, KEY, KEY_DIGITS, QUERY


class Blocks:
    """A source of blocks of `length` tokens, int64, from one generator.

    landmark: the token that ends each block; None for memories without.
    """

    def __init__(self, length: int, seed: int, landmark: int | None = None) -> None:
        self.length, self.landmark = length, landmark
        self.regular = length if landmark is None else length - 1
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
        tokens = self.whole(0, FILLER, rows, blocks, self.length)
        if self.landmark is not None:
            tokens[..., -1] = self.landmark
        return tokens

    def keys(self, rows: int) -> Tensor:
        """Return [rows, 4] digits, as tokens."""
        return self.whole(FILLER, FILLER + DIGITS, rows, KEY_DIGITS)

    def put_keys(self, blocks: Tensor, keys: Tensor, *, room: int | None = None) -> None:
        """Write `KEY d d d d` into blocks [rows, length], in the first `room` tokens."""
        at = self.whole(0, (room or self.regular) - KEY_DIGITS, len(blocks)).unsqueeze(1)
        marked = torch.cat((torch.full_like(keys[:, :1], KEY), keys), 1)
        blocks.scatter_(1, at + torch.arange(KEY_DIGITS + 1), marked)

    def questions(self, keys: Tensor) -> Tensor:
        """Return [rows, 1, length]: filler that ends with `QUERY d d d d`."""
        blocks, end = self.filler(len(keys)), self.regular
        blocks[:, 0, end - KEY_DIGITS : end] = keys
        blocks[:, 0, end - KEY_DIGITS - 1] = QUERY
        return blocks

    def answers(self, logits: Tensor) -> Tensor:
        """Return the logits [rows, 4, V] of the digits, of logits [rows, N, length, V]."""
        return logits[:, -1, self.regular - KEY_DIGITS - 1 : self.regular - 1]
