"""Carried states as values: rows taken, put, joined, made noisy. What is inside stays unknown."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.memory.base import State, map_tensors, named_tensors


def pick(state: State, rows: Tensor) -> State:
    """Return the given rows (indices or a mask) of a state."""
    return map_tensors(lambda tensor: tensor[rows], state)


def combine(function: Callable[[Tensor, Tensor], Tensor], a: State, b: State) -> State:
    """Return a state of function(x, y) over the tensors of two states of one form."""
    others = iter(named_tensors(b, "").values())
    return map_tensors(lambda tensor: function(tensor, next(others)), a)


def join(a: State, b: State) -> State:
    """Return the rows of a, then those of b."""
    return combine(lambda x, y: torch.cat((x, y)), a, b)


def put(state: State, rows: Tensor, new: State) -> State:
    """Return the state with the rows at these indices replaced."""

    def replaced(x: Tensor, y: Tensor) -> Tensor:
        return x.index_copy(0, rows, y.detach().to(x.dtype))

    return combine(replaced, state, new)


def noisy(state: State, share: float, normal: Callable[[torch.Size], Tensor]) -> State:
    """Return the state with Gaussian noise: std `share` times the RMS of each row's last dim.

    Flags and counts, which are whole numbers, stay as they are.
    """
    if share == 0:
        return state

    def shaken(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.numel() == 0:
            return x
        scale = x.detach().square().mean(-1, keepdim=True).sqrt()
        return x + share * scale * normal(x.shape).to(x)

    return map_tensors(shaken, state)


def num_bytes(state: State) -> int:
    """Return what the state takes, all rows together."""
    return sum(x.numel() * x.element_size() for x in named_tensors(state, "").values())
