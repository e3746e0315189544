"""A prompt read once: a short cache of every layer's keys, and decoding from it.

How the cache is filled is another file's matter (model.homer); here is what a block does to rows
whose positions are given one by one, and one decode step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.block import Block
from model.decoder import Decoder
from model.kernels import choose_kernel
from model.rope import rope_tables, rotate


class Rows(NamedTuple):
    """Some tokens after the layers they have run."""

    hidden: Tensor  # [T, D]
    positions: Tensor  # [T] int64, CPU
    keys: list[Tensor]  # [T, Hkv, K] of each of those layers, rotated
    values: list[Tensor]


@dataclass(eq=False)
class Compact:
    """What decoding continues from: every layer's keys and values of the tokens that were kept.

    `continue_from` adds to it in place.
    """

    model: Decoder
    keys: Tensor  # [layers, capacity, Hkv, K], rotated; rows from num_tokens on are not in use
    values: Tensor
    positions: Tensor  # [capacity] int64: the position of each token, rising only by chunk
    num_tokens: int
    next_position: int
    hidden: Tensor  # [D]: of the last token after the last block, before the final norm
    logits: Tensor  # [V]: what comes after the last token


def compact_of(model: Decoder, rows: Rows, segment_len: int) -> Compact:
    """Return the cache of rows that have run all layers, with space up to segment_len positions."""
    count, position = len(rows.hidden), int(rows.positions[-1]) + 1
    shape = (len(rows.keys), count + segment_len - position, *rows.keys[0].shape[1:])
    compact = Compact(
        model,
        rows.hidden.new_zeros(shape),
        rows.hidden.new_zeros(shape),
        torch.zeros(shape[1], dtype=torch.int64),
        count,
        position,
        rows.hidden[-1].clone(),
        last_logits(model, rows.hidden),
    )
    compact.positions[:count] = rows.positions
    for i, (k, v) in enumerate(zip(rows.keys, rows.values, strict=True)):
        compact.keys[i, :count], compact.values[i, :count] = k, v
    return compact


@torch.no_grad()
def continue_from(compact: Compact, token: int) -> Tensor:
    """Return the logits [V] after one more token, whose keys and values join the cache.

    Raises ValueError past the last position the model was trained on.
    """
    model, count, position = compact.model, compact.num_tokens, compact.next_position
    if count == len(compact.positions):
        raise ValueError(
            f"position {position} is past the segment_len={position} the model was trained on; to"
            " generate more, use a chunk_len that leaves positions for it"
        )
    x, positions = embed(model, torch.tensor([token])), torch.tensor([position])
    turns = turns_of(model, positions, x)
    for i, block in enumerate(model.layers()):
        q, k, v = project(block, x, turns)
        compact.keys[i, count], compact.values[i, count] = k[0], v[0]
        seen = slice(count + 1)
        attended = attend(q, compact.keys[i, seen], compact.values[i, seen], causal=False)
        x = block.finish(x, attended)
    compact.positions[count] = position
    compact.num_tokens, compact.next_position = count + 1, position + 1
    compact.hidden, compact.logits = x[0], last_logits(model, x)
    return compact.logits


def embed(model: Decoder, tokens: Tensor) -> Tensor:
    """Return the embeddings [T, D] of tokens [T], on the model's device."""
    return model.embed(tokens.to(next(model.parameters()).device))


def last_logits(model: Decoder, hidden: Tensor) -> Tensor:
    """Return the logits [V] after the last row of hidden [T, D]."""
    tied = model.embedding.weight if model.config.tie_embeddings else None
    logits: Tensor = model.head(hidden[-1:], None, None, tied)
    return logits[0]


def turns_of(model: Decoder, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [T, 1, K / 2], of positions [T]."""
    config = model.config
    cos, sin = rope_tables(positions, config.head_dim, config.rope_base, like, config.rope_scaling)
    return cos.unsqueeze(1), sin.unsqueeze(1)


def project(block: Block, x: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [T, H, K], k and v [T, Hkv, K] of rows x; q and k rotated by turns_of."""
    q, k, v, _ = block.project(x)
    return rotate(q, *turns), rotate(k, *turns), v


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Return attention [Tq, H, K] of q [Tq, H, K] over k, v [Tk, Hkv, K]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, _ = choose_kernel(q).forward(q, k, v, causal)
    return out[0].transpose(0, 1)
