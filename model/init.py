"""Initial weights: a function of (seed, parameter name) alone, so of no layout.

Normal(0, init_std) for embeddings, linear maps and the memory prompt; maps that end on the residual
stream (attention output, FFN down) have their std divided by sqrt(2 * num_layers), as in GPT-2;
norms and gains start at 1, biases at 0. Adapters begin as no change: A normal with the variance of
Hu et al.'s code, 1 / (3 * inputs), B at 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model import lora
from model.config import (
    AbcMemory,
    ArmtMemory,
    CmabMemory,
    ComposedMemory,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    MemoryConfig,
    ModelConfig,
    RmtMemory,
)

RESIDUAL = ("output.weight", "ffn.down.weight", "mixer.value.weight")
"""Endings, inside a block, of maps that end on the residual stream."""

VALUES = "mixer.value.weight"
"""Of armt's map from a normalised row to what its matrix holds, which is read onto the stream as it
is. At other maps' size it would be sqrt(hidden_size) times an embedding, and drown it."""

Shape = Callable[[nn.Parameter], torch.Size]
Take = Callable[[nn.Parameter, Tensor], Tensor]


def initialise(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    *,
    shape: Shape = lambda parameter: parameter.shape,
    take: Take = lambda parameter, whole: whole,
) -> None:
    """Fill the model's weights in place.

    shape and take belong to a layout: a parameter's shape over all ranks, and this rank's part of
    a whole tensor. Whole tensors exist one at a time, on the parameter's device.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            value = getattr(parameter, "initial_value", None)  # layers.starts_at
            if value is not None:
                parameter.fill_(value)
                continue
            whole = initial_value(name, shape(parameter), config, seed, parameter.device)
            parameter.copy_(take(parameter, whole))


def initial_value(
    name: str, shape: torch.Size, config: ModelConfig, seed: int, device: torch.device
) -> Tensor:
    """Return the whole initial value of one parameter, float32."""
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    std = config.init_std
    if name.startswith("blocks.") and name.endswith(RESIDUAL):
        std /= math.sqrt(2 * config.num_layers)
    if name.endswith(VALUES):
        std /= math.sqrt(config.hidden_size)
    if name.endswith(lora.A):
        std = 1 / math.sqrt(3 * shape[1])
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, device=device) * std


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters, padding of the vocabulary left out (by arithmetic)."""
    d, layers = config.hidden_size, config.num_layers
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = d * (heads + 2 * kv_heads) + heads * d + 3 * d * config.ffn_size + 2 * d
    block += config.qkv_bias * (heads + 2 * kv_heads)
    embeddings = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    held = layers * block + embeddings + d + lora.count_adapters(config)
    return held + _count_memory(config, config.memory)


def _count_memory(config: ModelConfig, memory: MemoryConfig) -> int:
    d, layers = config.hidden_size, config.num_layers
    match memory:
        case FamMemory():
            return memory.slots * d + layers * d * (memory.state != "paper")
        case InfiniMemory():
            return layers * config.num_heads
        case AbcMemory():
            return layers * (d + config.qkv_bias) * config.num_kv_heads * memory.slots
        case CmabMemory():
            return layers * config.num_kv_heads * memory.latents * config.head_dim
        case RmtMemory():
            return memory.slots * d * (1 + memory.offset) + d * (memory.state != "paper")
        case ArmtMemory():
            return memory.slots * d + layers * d * (2 * memory.key_dim + d + 1)
        case HmtMemory():
            return 2 * d * (1 + memory.search_dim)
        case ComposedMemory():
            return sum(_count_memory(config, part) for part in memory.parts)
        case _:
            return 0
