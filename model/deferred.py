"""Weight gradients of maps that are used again and again on a few rows: one product for all uses.

A chain over segments puts F rows through the layer's weights once a segment. Autograd would make a
whole weight's gradient for each use and add it to the last: what that moves is the size of the
weights, and what it computes F rows' worth. Inside `deferred` a use's backward returns the gradient
of its rows alone, which the chain waits for; when the last use is done, one product over the rows
of all makes the weight's. (Pipelines part the two likewise: Qi et al. 2023, Zero Bubble Pipeline
Parallelism, 2401.10241.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

Multiply = Callable[[Tensor, Tensor], Tensor]
"""a [m, k], b [n, k] -> a @ b.T [m, n], without gradient."""

_deferring: dict[Tensor, _Uses] | None = None


@contextmanager
def deferred() -> Iterator[None]:
    """Make one gradient of each weight for all uses inside, however many."""
    global _deferring
    outer, _deferring = _deferring, {}
    try:
        yield
    finally:
        _deferring = outer


def defers(weight: Tensor) -> bool:
    """Return whether this use of a weight is one of several whose gradient is made at once."""
    return _deferring is not None and weight.requires_grad and torch.is_grad_enabled()


def deferred_product(x: Tensor, weight: Tensor, multiply: Multiply) -> Tensor:
    """Return multiply(x, weight), x [rows, in], weight [out, in]: [rows, out]; if `defers` says so.

    Its gradients are multiply's too, each of two factors whose last dimension is summed over.
    """
    assert _deferring is not None
    uses = _deferring.get(weight)
    if uses is None:
        uses = _deferring[weight] = _Uses(weight, multiply)
    result: Tensor = _Use.apply(x, uses.end, uses)  # type: ignore[no-untyped-call]
    return result


class Linear(nn.Linear):
    """A linear map that knows of `deferred`."""

    def forward(self, x: Tensor) -> Tensor:
        """X [rows, in] -> [rows, out]."""
        if not defers(self.weight):
            return super().forward(x)
        result = deferred_product(x, self.weight, plain_product)
        return result if self.bias is None else result + self.bias


def plain_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.T."""
    return functional.linear(a, b)


class _Uses:
    """The uses of one weight."""

    def __init__(self, weight: Tensor, multiply: Multiply) -> None:
        self.weight, self.multiply = weight, multiply
        self.rows: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.end: Tensor = _End.apply(weight, self)  # type: ignore[no-untyped-call]

    def add(self, rows: Tensor, grad: Tensor) -> None:
        """Keep what one use's share of the weight's gradient is made of."""
        self.rows.append(rows)
        self.grads.append(grad)

    def gradient(self) -> Tensor | None:
        """Return the weight's gradient of all uses since it was last asked for."""
        if not self.rows:
            return None
        rows, grads = torch.cat(self.rows), torch.cat(self.grads)
        self.rows, self.grads = [], []
        return self.multiply(grads.t(), rows.t())


class _End(torch.autograd.Function):
    """The node that every use leads to, and so runs after them; nothing flows into it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, uses: _Uses) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.uses = uses
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.uses.gradient(), None


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, end: Tensor, uses: _Uses) -> Tensor:
        ctx.save_for_backward(x, uses.weight)
        ctx.uses = uses
        return uses.multiply(x, uses.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.uses.add(x, grad)
        of_x = ctx.uses.multiply(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return of_x, None, None
