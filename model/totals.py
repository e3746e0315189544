"""Sums and merges over the ranks that hold parts of a segment, forward and backward.

What comes out is the same on every rank; what each rank uses of it has a part of the gradient only,
so gradients are summed on the way back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention import Exchange


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.sum(grad.contiguous()), None


def total(x: Tensor, exchange: Exchange) -> Tensor:
    """Return the sum over ranks of each rank's x; every rank then holds it."""
    result: Tensor = _Total.apply(x, exchange)  # type: ignore[no-untyped-call]
    return result


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
        joined = exchange.combine(out, lse)
        ctx.save_for_backward(out, lse, *joined)
        ctx.exchange = exchange
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, None]:
        mine, mine_lse, out, lse = ctx.saved_tensors
        grads = ctx.exchange.sum(torch.cat((dout, dlse.unsqueeze(-1)), -1).contiguous())
        dout, dlse = grads[..., :-1], grads[..., -1]
        share = torch.exp(mine_lse - lse)
        own = (dout * (mine - out)).sum(-1) + dlse
        return dout * share.unsqueeze(-1), own * share, None


def combine(out: Tensor, lse: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Return (out [..., K], lse [...]) merged over the ranks; every rank then holds it.

    Each rank's part must have read something: an lse above -inf.
    """
    result: tuple[Tensor, Tensor] = _Combine.apply(out, lse, exchange)  # type: ignore[no-untyped-call]
    return result
