"""Segments on a diagonal: layer l of segment n beside layer l + 1 of segment n - 1.

Where what a memory carries stays inside each layer (armt), layer l of segment n waits for layer
l - 1 of segment n and for layer l of segment n - 1 only. So all that lies on one diagonal of
(layer, segment) runs as one block: the layers' weights are stacked, their rows stand one after the
other as more streams would, and each stretch of rows meets its own layer's weights. N segments
through L layers are N + L - 1 calls instead of N * L, of up to L times the rows. (Diagonal
batching, Sivtsov et al. 2025, 2506.05229.)

The stacked weights are a copy of all blocks', for as long as the backward needs them. Nothing
between a stacked block's maps may cut its rows: a part of them would meet the wrong layers.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor, nn

from model.block import Block
from model.deferred import Linear
from model.interfaces import Linears, Segments
from model.layers import RMSNorm, scaled
from model.memory.base import State, join_rows, take_rows
from model.memory.frame import Rows
from model.memory.in_turn import InTurn

Run = Callable[..., tuple[Tensor, Rows, State]]
"""Takes a block and what it takes; as Block returns."""


def check_wavefront(name: str, memory: nn.Module, linears: Linears, ffn_chunk: int | None) -> None:
    """Raise ValueError where a memory, a layout or chunks of rows allow no diagonals."""
    if not (isinstance(memory, InTurn) and memory.wavefront):
        raise ValueError(
            f"wavefront is for armt, whose layers hold all that is carried, and this is {name}:"
            " leave it out"
        )
    if linears.size > 1:
        raise ValueError(
            f"wavefront stacks whole weights of all layers, and tp={linears.size} cuts them; use"
            " tp=1, or leave wavefront out"
        )
    if ffn_chunk is not None:
        raise ValueError(
            f"wavefront hands a block the rows of many layers at once, and ffn_chunk={ffn_chunk}"
            " would cut across them; use one of the two"
        )


def diagonals(
    blocks: Items[Block],
    enter: Callable[[int], tuple[Tensor, Rows]],
    segments: Segments,
    states: Items[State],
    run: Run,
) -> tuple[Tensor, list[State]]:
    """Return rows of tokens after all blocks, segment after segment, and the layers' states.

    enter(n): rows of tokens and of memory that segment n brings to the lowest block; states: of
    each layer, before the first segment. Raises ValueError where blocks hold other weights than
    linear maps and norms, or maps that are not whole on this device.
    """
    count, depth, batch = segments.num_segments, len(blocks), segments.batch
    stacked = _stacked(blocks)
    starts = segments.starts.t()  # [N, B]
    # Of the layers at work, the lowest first: rows of tokens and of memory that they read, states.
    x: list[Tensor] = []
    rows: list[Rows] = []
    held: list[State] = []
    found, after = [], []
    for step in range(count + depth - 1):
        low, high = max(0, step - count + 1), min(depth, step + 1)
        if step < count:
            tokens, beside = enter(step)
            x, rows = [tokens, *x], [beside, *rows]
        if step < depth:
            held.append(states[step])
        here = segments.of(0)._replace(
            batch=batch * (high - low),
            starts=starts[step + 1 - high : step + 1 - low].flip(0).reshape(-1, 1),
        )
        # All layers are taken without a slice, whose gradient would be one more copy each time.
        block = stacked if high - low == depth else _some(stacked, slice(low, high))
        together = rows[0]._replace(x=torch.cat([each.x for each in rows]))
        out, above, state = run(block, torch.cat(x), together, here, join_rows(held), {})
        x = list(out.chunk(high - low))
        rows = [above._replace(x=part) for part in above.x.chunk(high - low)]
        held = [take_rows(state, slice(i, i + batch)) for i in range(0, here.batch, batch)]
        if high == depth:
            found.append(x.pop())
            rows.pop()
        if step >= count - 1:
            after.append(held.pop(0))
    return torch.cat(found), after


class _Maps(nn.Module):
    """Linear maps of some layers, each for its stretch of the rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias, self.out_features = weight, bias, weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """X [rows, in] -> [rows, out]."""
        out: Tensor = x.unflatten(0, (len(self.weight), -1)) @ self.weight.transpose(1, 2)
        if self.bias is not None:
            out = out + self.bias.unsqueeze(1)
        return out.flatten(0, 1)

    def some(self, layers: slice) -> _Maps:
        """Return those of some of the layers."""
        return _Maps(self.weight[layers], None if self.bias is None else self.bias[layers])


class _Norms(nn.Module):
    """Norms of some layers, each for its stretch of the rows."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x [rows, features], in the weight's type."""
        stretches = x.unflatten(0, (len(self.weight), -1))
        normed: Tensor = scaled(stretches, self.weight.unsqueeze(1), self.eps)
        return normed.flatten(0, 1)

    def some(self, layers: slice) -> _Norms:
        """Return those of some of the layers."""
        return _Norms(self.weight[layers], self.eps)


def _stacked(layers: Items[nn.Module]) -> Any:
    """Return one module that is these of several layers, each for its stretch of the rows."""
    first = layers[0]
    if type(first) in (nn.Linear, Linear) and not first._forward_hooks:
        bias = None if first.bias is None else _stack(layers, "bias")
        return _Maps(_stack(layers, "weight"), bias)
    if isinstance(first, RMSNorm):
        return _Norms(_stack(layers, "weight"), first.eps)
    own = [name for name, _ in first.named_parameters(recurse=False)]
    if own:
        raise ValueError(
            f"{type(first).__name__} has weights of its own ({', '.join(own)}), and wavefront"
            " stacks plain linear maps and norms only; leave it out"
        )
    return _with_children(
        first,
        {name: _stacked([getattr(layer, name) for layer in layers]) for name in first._modules},
    )


def _some(stacked: Any, layers: slice) -> Any:
    """Return a stacked module of some of its layers."""
    if isinstance(stacked, _Maps | _Norms):
        return stacked.some(layers)
    children = {name: _some(child, layers) for name, child in stacked._modules.items()}
    return _with_children(stacked, children)


def _with_children(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """Return a module like this one, with other submodules.

    What a tool has hung on the one module (a forward of its own, hooks that name its layer) is not
    for all of them.
    """
    other = copy.copy(module)
    other.__dict__.pop("forward", None)
    other._forward_hooks, other._forward_pre_hooks = OrderedDict(), OrderedDict()
    other._modules = dict(children)
    return other


def _stack(layers: Items[nn.Module], name: str) -> Tensor:
    return torch.stack([getattr(layer, name) for layer in layers])
