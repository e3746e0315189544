"""How far two results are apart, and whether that is rounding."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from train.checking.plain import Trained

FLOORS = {"loss": 1e-6, "gradient norm": 2e-6, "gradient": 1e-5, "weight": 2e-6}
"""What float32 may be off, of the largest element of the same tensor: design.md, equivalence.

Three steps move weights by about 1e-2 of their size, so theirs is 2e-4 of the way."""

NOISE = 5.0
"""Times what one process loses by its type of number: sums in another order lose no more."""

OF_NORM, OF_WHOLE = 1e-5, 1e-2
"""Of the gradient's norm, and of the tensor that it is a part of: errors are at least relative to.

Some gradients are 0 by mathematics, as that of a bias under a softmax; what they have is rounding
of larger numbers. Others are a hundred times larger than these bounds and more."""

Key = tuple[str, str, int]
"""Of a quantity: its kind, its name and the step."""


class Difference(NamedTuple):
    """One quantity's largest error, relative to its largest element."""

    kind: str  # a key of FLOORS; exchange, of dK and dV alone; slope, of one process
    name: str  # the parameter, with (q), (k), (v) for parts of one
    step: int  # 0, 1, 2
    error: float
    tolerance: float

    @property
    def passes(self) -> bool:
        """Return whether it is within tolerance; NaN is not."""
        return self.error <= self.tolerance

    @property
    def excess(self) -> float:
        """Return the error in tolerances, infinite for NaN: what to sort by."""
        return math.inf if math.isnan(self.error) else self.error / self.tolerance

    def describe(self) -> str:
        """Return what it is of, such as `gradient of blocks.0.output.weight (layer 0), step 1`."""
        if self.kind == "exchange":
            return f"{self.name} as the ranks exchange them"
        layer = re.search(r"\bblocks\.(\d+)\.", self.name)
        of = f" of {self.name}" + (f" (layer {layer[1]})" if layer else "") if self.name else ""
        when = "after three steps" if self.kind == "weight" else f"step {self.step + 1}"
        if self.kind == "slope":
            return f"gradient beside the loss's slope{of}"
        return f"{self.kind}{of}, {when}"


def compare(
    actual: Trained, expected: Trained, rounded: Trained, config: ModelConfig
) -> list[Difference]:
    """Return the difference of every quantity.

    expected: in float64; rounded: the same in the run's own type by one process, whose errors say
    what is rounding.
    """
    errors = dict(_errors(actual, expected, config))
    noise = _pooled(dict(_errors(rounded, expected, config)))
    return [
        Difference(*key, error, max(FLOORS[key[0]], NOISE * noise[_alike(key)]))
        for key, error in errors.items()
    ]


def relative(actual: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Return max |actual - expected| / max |expected|, the former alone where the latter is 0.

    least: of the divisor. NaN anywhere gives NaN, which passes no comparison. Raises ValueError for
    unequal shapes.
    """
    actual, expected = actual.detach(), expected.detach()
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ")
    if not expected.numel():
        return 0.0
    wide = torch.promote_types(actual.dtype, expected.dtype)
    if not wide.is_floating_point:
        wide = torch.float64
    apart = (actual.to(wide) - expected.to(wide)).abs().max()
    size = expected.to(wide).abs().max().clamp(min=least)
    return float(apart / size if size > 0 else apart)


def _errors(actual: Trained, expected: Trained, config: ModelConfig) -> Iterator[tuple[Key, float]]:
    for number, (step, plain) in enumerate(zip(actual.steps, expected.steps, strict=True)):
        yield ("loss", "", number), abs(step.loss / plain.loss - 1)
        yield ("gradient norm", "", number), abs(step.grad_norm / plain.grad_norm - 1)
        least = OF_NORM * plain.grad_norm
        for name, error in _of_each(step.gradients, plain.gradients, config, least):
            yield ("gradient", name, number), error
    for name, error in _of_each(actual.weights, expected.weights, config):
        yield ("weight", name, len(expected.steps) - 1), error


def _of_each(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    config: ModelConfig,
    least: float = 0.0,
) -> Iterator[tuple[str, float]]:
    """Yield (name, error) of tensors [replicas, ...] or [...] against [...], part by part."""
    if actual.keys() != expected.keys():
        raise ValueError(f"parameters differ: {sorted(actual.keys() ^ expected.keys())}")
    for name, whole in expected.items():
        mine = actual[name].to(whole.dtype)
        mine = mine if mine.dim() > whole.dim() else mine.unsqueeze(0)
        size = max(least, OF_WHOLE * float(whole.abs().max()))
        for part, there in _parts(name, whole, 0, config).items():
            here = _parts(name, mine, 1, config)[part]
            yield part, relative(here, there.expand_as(here), size)


def _parts(name: str, x: Tensor, dim: int, config: ModelConfig) -> dict[str, Tensor]:
    """Return q, k, v and what a memory adds of a stacked map (model.layers.QKV), or x itself."""
    if ".qkv.linear." not in name or name.endswith("lora_a.weight"):
        return {name: x}
    heads = x.unflatten(dim, (config.num_kv_heads, -1))
    sizes = [config.num_heads // config.num_kv_heads * config.head_dim] + 2 * [config.head_dim]
    rest = heads.shape[dim + 1] - sum(sizes)
    names = ["q", "k", "v"] + ["memory"] * (rest > 0)
    split = heads.split(sizes + [rest] * (rest > 0), dim + 1)
    return {f"{name} ({part})": tensor for part, tensor in zip(names, split, strict=True)}


def _alike(key: Key) -> tuple[str, str]:
    """Return what a quantity shares its rounding with: the other steps and layers."""
    return key[0], re.sub(r"\.\d+\.", ".", key[1])


def _pooled(noise: dict[Key, float]) -> dict[tuple[str, str], float]:
    """Return the rounding of each kind of parameter, at least the median of all parameters.

    A gradient of one number can be right by chance, and says nothing then.
    """
    found: dict[tuple[str, str], float] = {}
    for key, error in noise.items():
        found[_alike(key)] = max(found.get(_alike(key), 0.0), error)
    for kind in {kind for kind, _ in found}:
        usual = median(error for other, error in found.items() if other[0] == kind)
        for key_alike in found:
            if key_alike[0] == kind:
                found[key_alike] = max(found[key_alike], usual)
    return found
