"""Which tensors of a published folder a parameter of ours is made of.

    embedding.weight                    model.embed_tokens.weight, rows of the padding left out
    blocks.N.attention_norm.weight      model.layers.N.input_layernorm.weight
    blocks.N.qkv.linear.weight, .bias   ....self_attn.q_proj, k_proj, v_proj, by key-value head
    blocks.N.output.weight              ....self_attn.o_proj.weight
    blocks.N.ffn_norm.weight            ....post_attention_layernorm.weight
    blocks.N.ffn.gate_up.weight         ....mlp.gate_proj.weight on top of mlp.up_proj.weight
    blocks.N.ffn.down.weight            ....mlp.down_proj.weight
    head.norm.weight                    model.norm.weight
    head.output.weight                  lm_head.weight, likewise without padding

Rotation pairs the same halves of a head in both, so no row moves inside a head. What a memory has
keeps our names; rows that it added to a layer's projection are `blocks.N.qkv.extra.*`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.config import ModelConfig

_WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.norm.weight": "model.norm.weight",
    "head.output.weight": "lm_head.weight",
}
_IN_A_BLOCK = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "qkv.linear.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "qkv.linear.bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    "output.weight": ("self_attn.o_proj.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.down.weight": ("mlp.down_proj.weight",),
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


class Piece(NamedTuple):
    """One tensor of a folder."""

    name: str
    shape: tuple[int, ...]

    @property
    def of_memory(self) -> bool:
        """Whether the standard format has no place for it."""
        return not self.name.startswith(("model.", "lm_head."))


@dataclass(frozen=True)
class Parameter:
    """A parameter of ours and the tensors that it is made of."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    groups: int = 1  # runs of rows, each with rows of every piece: one a key-value head
    padding: int = 0  # rows at the end that stand for no token

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Return the parameter; rows of the padding are 0."""
        if len(tensors) == 1:
            return _padded(tensors[0], self.padding)
        parts = [tensor.unflatten(0, (self.groups, -1)) for tensor in tensors]
        return torch.cat(parts, 1).flatten(0, 1)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return the pieces: the inverse of join."""
        if len(self.pieces) == 1:
            return [whole[: len(whole) - self.padding]]
        rows = [piece.shape[0] // self.groups for piece in self.pieces]
        parts = whole.unflatten(0, (self.groups, -1)).split(rows, 1)
        return [part.flatten(0, 1) for part in parts]


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return functional.pad(tensor, (0, 0, 0, rows)) if rows else tensor


def pieces_of(config: ModelConfig, shapes: Mapping[str, torch.Size]) -> dict[str, Parameter]:
    """Return each parameter's pieces; shapes: of all parameters of the model, by name."""
    return {name: _parameter(config, name, tuple(shape)) for name, shape in shapes.items()}


def _parameter(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Parameter:
    block = _BLOCK.fullmatch(name)
    if name in ("embedding.weight", "head.output.weight"):
        padding = config.padded_vocab_size - config.vocab_size
        piece = Piece(_WHOLE[name], (config.vocab_size, *shape[1:]))
        return Parameter(shape, (piece,), padding=padding)
    if name in _WHOLE:
        return Parameter(shape, (Piece(_WHOLE[name], shape),))
    if block is None or block[2] not in _IN_A_BLOCK:
        return Parameter(shape, (Piece(name, shape),))
    number, inside = block[1], block[2]
    names = [f"model.layers.{number}.{theirs}" for theirs in _IN_A_BLOCK[inside]]
    if not inside.startswith("qkv."):
        rows = shape[0] // len(names)
        return Parameter(shape, tuple(Piece(name, (rows, *shape[1:])) for name in names))
    heads, width = config.num_kv_heads, config.head_dim
    rows_of = [config.num_heads * width, heads * width, heads * width]
    if extra := shape[0] - sum(rows_of):
        names.append(f"blocks.{number}.qkv.extra.{inside.rpartition('.')[2]}")
        rows_of.append(extra)
    pieces = [Piece(name, (rows, *shape[1:])) for name, rows in zip(names, rows_of, strict=True)]
    return Parameter(shape, tuple(pieces), groups=heads)
