"""A prompt read by several ranks, and decoding from it: no device holds all of its keys.

For models with `memory: none`, whose keys grow with the prompt. Every rank holds the weights. The
prompt is cut over the ranks and read through the ring, as in training; each rank keeps the keys of
its own tokens. Then all ranks decode the same token together, each over its own keys
(parallel.decode).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from model.attention import Exchange
from model.compact import embed, last_logits, project, turns_of
from model.config import MemoryConfig, NoMemory
from model.decoder import Decoder
from model.local import FoldedSequence
from parallel.decode import ShardedKeys, attend, shard
from parallel.slicing import layout_of


@dataclass(eq=False)
class Sharded:
    """What decoding continues from: every layer's keys and values, this rank's share of them.

    `continue_from` adds to it in place.
    """

    model: Decoder
    layers: list[ShardedKeys]
    segment_len: int  # positions that the model was trained on
    logits: Tensor  # [V]: what comes after the last token, on every rank

    @property
    def num_tokens(self) -> int:
        """Tokens read so far, over all ranks."""
        return self.layers[0].num_tokens

    @property
    def nbytes(self) -> int:
        """Size of the keys and values that this rank holds."""
        held = [x for keys in self.layers for x in (keys.k, keys.v, keys.new_k, keys.new_v)]
        return sum(x.numel() * x.element_size() for x in held)


def check_sharded(memory: MemoryConfig, ranks: int) -> None:
    """Raise ValueError for a model whose keys several ranks cannot share."""
    if not isinstance(memory, NoMemory):
        raise ValueError(
            f"model.memory={memory.name} reads a prompt segment by segment and keeps the keys of"
            f" one, so there is nothing to share out over {ranks} ranks; run it in one process,"
            " without torchrun"
        )


@torch.no_grad()
def read_prompt(model: Decoder, tokens: Tensor, exchange: Exchange, segment_len: int) -> Sharded:
    """Return the prompt, tokens int64 [T], read by the ranks of an exchange.

    model: whole, on every rank. segment_len: what it was trained on, which bounds the prompt and
    what is decoded behind it. A rank holds the keys of T / size + 2 tokens at most. Every rank
    calls this together, with the same tokens. Raises ValueError for a model with memory, and for a
    prompt that is empty or longer than segment_len.
    """
    check_sharded(model.config.memory, exchange.size)
    count, unit = len(tokens), 2 * exchange.size
    if not count:
        raise ValueError("the prompt is empty; give at least one token")
    if count > segment_len:
        raise ValueError(
            f"the prompt has {count:,} tokens, and the model was trained on segment_len="
            f"{segment_len}; give its last {segment_len}, less the tokens to generate"
        )
    layout = layout_of("zigzag", exchange.size)
    # Padding lies behind every token, so no token reads it.
    padded = pad(tokens, (0, -count % unit))
    places = layout.positions(exchange.rank, len(padded))
    x, num_real = embed(model, padded[places]), int((places < count).sum())
    sequence, turns, layers = FoldedSequence(layout, exchange), turns_of(model, places, x), []
    for block in model.layers():
        q, k, v = (rows.view(1, 1, *rows.shape) for rows in project(block, x, turns))
        attended = sequence.fold(q, k, v)[0, 0]
        # Copies: the projection they are parts of, and the padding, are not kept.
        k, v = (rows[0, :, :num_real].clone() for rows in (k, v))
        layers.append(shard(k, v, exchange))
        x = block.finish(x, attended)
    last = x[(places == count - 1).to(x.device)]  # no row on all ranks but one
    logits = last_logits(model, exchange.sum(last.sum(0, keepdim=True)))
    return Sharded(model, layers, segment_len, logits)


@torch.no_grad()
def continue_from(sharded: Sharded, token: int) -> Tensor:
    """Return the logits [V] after one more token, whose keys and values join the share of a rank.

    Every rank calls this together, with the same token. Raises ValueError past the last position
    the model was trained on.
    """
    model, position = sharded.model, sharded.num_tokens
    if position == sharded.segment_len:
        raise ValueError(
            f"position {position} is past the segment_len={position} the model was trained on; to"
            " generate more, give a shorter prompt"
        )
    x = embed(model, torch.tensor([token]))
    turns = turns_of(model, torch.tensor([position]), x)
    for i, block in enumerate(model.layers()):
        q, k, v = (rows.unsqueeze(0) for rows in project(block, x, turns))
        sharded.layers[i] = sharded.layers[i].append(k, v)
        x = block.finish(x, attend(q, sharded.layers[i])[0])
    sharded.logits = last_logits(model, x)
    return sharded.logits
