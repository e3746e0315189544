"""Landmark tokens: one after every block - 1 regular tokens, so that it closes its block.

They take positions, but are no text: no loss is taken at one, and none is ever a label (Mohtashami
& Jaggi 2023, as their language-modelling code has it). Offsets go on counting regular tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.streams import IGNORE, Batch

if TYPE_CHECKING:
    from torch import Tensor


def regular_len(segment_len: int, block: int) -> int:
    """Return how many regular tokens a segment of segment_len positions holds.

    segment_len counts landmarks, block its own one. Raises ValueError where a block has no room for
    a regular token, or segments are no whole blocks.
    """
    _check_block(block)
    if segment_len < block or segment_len % block:
        raise ValueError(
            f"segment_len={segment_len} is not a multiple of the landmark block={block} (a segment"
            f" is whole blocks, landmarks counted); use {max(segment_len // block, 1) * block}"
        )
    return segment_len // block * (block - 1)


def insert_landmarks(batch: Batch, block: int, landmark: int) -> Batch:
    """Return the batch with token `landmark` after every block - 1 tokens of each segment.

    tokens and labels [B, N, R] become [B, N, R / (block - 1) * block]. A landmark's label is
    IGNORE; a token's stays the next regular token, also across a landmark. Starts and offsets stay
    (offsets in regular tokens). Raises ValueError where R is not a multiple of block - 1, or the
    data uses the landmark's id.
    """
    _check_block(block)
    regular = batch.tokens.shape[2]
    if regular % (block - 1):
        near = max(regular // (block - 1), 1) * (block - 1)
        raise ValueError(
            f"segments of {regular} regular tokens are not a multiple of {block - 1} (the landmark"
            f" block={block} less its landmark); read segments of {near}"
        )
    if bool((batch.tokens == landmark).any()):
        raise ValueError(
            f"landmark={landmark} is the id of a token that the data holds; use an id past the"
            f" tokenizer's vocabulary"
        )
    return batch._replace(
        tokens=_close_blocks(batch.tokens, block, landmark),
        labels=_close_blocks(batch.labels, block, IGNORE),
    )


def _close_blocks(x: Tensor, block: int, value: int) -> Tensor:
    """Return x [B, N, R] with `value` after every block - 1 entries."""
    count, segments, regular = x.shape
    closed = x.new_full((count, segments, regular // (block - 1), block), value)
    closed[..., :-1] = x.unflatten(2, (-1, block - 1))
    return closed.flatten(2)


def _check_block(block: int) -> None:
    if block < 2:
        raise ValueError(
            f"landmark block={block} has no room for a regular token beside its landmark; use at"
            f" least 2"
        )
