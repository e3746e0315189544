"""Low-rank adapters (Hu et al. 2021): the model's own weights stay, small maps beside them learn.

An adapted linear map gives W x + alpha / rank * B A x. A and B are linear maps of the layout like
any other. Beside a column-parallel W, A is whole on every rank, takes this rank's rows and B is cut
as W is: what travels between tensor-parallel ranks is `rank` wide. Beside a row-parallel one, A is
cut over its inputs, and B whole. W keeps its name, so a checkpoint without adapters fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from model.config import AbcMemory, ComposedMemory, LoraConfig, LoraTarget, ModelConfig
from model.interfaces import Linears
from model.layers import scattered, starts_at

A, B = "lora_a.weight", "lora_b.weight"
"""Endings of adapters' names, after the name of the linear map."""


class _Target(NamedTuple):
    """One kind of linear map of a block."""

    path: str  # inside the block
    columns: bool  # its outputs are cut over tensor-parallel ranks, else its inputs
    stride: int = 1  # matrices stacked in it


_TARGETS: dict[LoraTarget, _Target] = {
    "qkv": _Target("qkv.linear", columns=True),
    "output": _Target("output", columns=False),
    "gate_up": _Target("ffn.gate_up", columns=True, stride=2),
    "down": _Target("ffn.down", columns=False),
}


def add_adapters(blocks: nn.ModuleList, lora: LoraConfig, linears: Linears) -> None:
    """Put adapters beside the linear maps that lora names, in every block."""
    for block in blocks:
        for name in lora.targets:
            target = _TARGETS[name]
            _adapt(block.get_submodule(target.path), target, lora, linears)


def _adapt(linear: nn.Module, target: _Target, lora: LoraConfig, linears: Linears) -> None:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    if target.columns:
        a: nn.Module = _whole(columns, lora.rank)
        b = linears.column(lora.rank, rows * linears.size, stride=target.stride)
    else:
        a = linears.row(columns * linears.size, lora.rank)
        b = _whole(lora.rank, rows)
    assert isinstance(b.weight, nn.Parameter)
    starts_at(b.weight, 0.0)
    linear.lora_a, linear.lora_b = a, b
    linear.register_forward_hook(_added(lora.alpha / lora.rank))


def _whole(in_features: int, out_features: int) -> nn.Linear:
    """Return a map that every tensor-parallel rank holds whole and gives its own rows."""
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight = scattered(nn.Parameter(linear.weight.detach()))
    return linear


def _added(scale: float) -> Callable[..., Tensor]:
    """Return a forward hook that adds the adapter's output."""

    def add(linear: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        result: Tensor = out + scale * linear.lora_b(linear.lora_a(inputs[0]))
        return result

    return add


def freeze(model: nn.Module, lora: LoraConfig) -> None:
    """Leave gradients to adapters, memory parameters and what lora.train_also names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, lora))


def is_trained(name: str, lora: LoraConfig | None) -> bool:
    """Return whether a parameter learns, by its name; without adapters all do."""
    if lora is None or is_adapter(name) or is_memory(name):
        return True
    if name in ("embedding.weight", "head.output.weight"):
        return "embeddings" in lora.train_also
    return "norms" in lora.train_also and name.endswith("norm.weight")


def is_adapter(name: str) -> bool:
    """Return whether a parameter is a part of an adapter."""
    return name.endswith((f".{A}", f".{B}"))


def is_memory(name: str) -> bool:
    """Return whether a parameter belongs to the memory, and so is absent without it."""
    return name.startswith("memory.") or ".mixer." in name


def count_adapters(config: ModelConfig) -> int:
    """Return the number of parameters of all adapters (by arithmetic)."""
    if config.lora is None:
        return 0
    d, queries = config.hidden_size, config.num_heads * config.head_dim
    memory = config.memory
    parts = memory.parts if isinstance(memory, ComposedMemory) else (memory,)
    extra = sum(part.slots for part in parts if isinstance(part, AbcMemory))
    widths = {
        "qkv": d + queries + config.num_kv_heads * (2 * config.head_dim + extra),
        "output": queries + d,
        "gate_up": d + 2 * config.ffn_size,
        "down": config.ffn_size + d,
    }
    in_and_out = sum(widths[name] for name in config.lora.targets)
    return config.num_layers * config.lora.rank * in_and_out


class Weights(Protocol):
    """Whole weights by name, such as a checkpoint's."""

    def __getitem__(self, name: str) -> Tensor:
        """Return one parameter, joined over all ranks."""
        ...

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a parameter."""
        ...


def merge_lora(name: str, weights: Weights, alpha: float) -> Tensor:
    """Return a weight with its adapter, if it has one, added: W + alpha / rank * B A.

    name: of the weight itself. The product is float32, or wider where the weight is.
    """
    weight = weights[name]
    stem = name.removesuffix("weight")
    if name == stem or stem + A not in weights:
        return weight
    a, b = weights[stem + A], weights[stem + B]
    return weight + alpha / a.shape[0] * (b @ a).to(weight.dtype)
