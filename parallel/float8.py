"""A column-parallel map's FP8 products, with tensor parallelism's messages beside them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.float8 import rounded_product


class _Column(torch.autograd.Function):
    """Megatron-core's order (Korthikanti et al. 2022): rows come while x's gradient is computed.

    That gradient goes while the weight's is computed. On GPUs with CUDA_DEVICE_MAX_CONNECTIONS=1.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup, scattered: bool
    ) -> Tensor:
        for_x, for_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        ctx.shape, ctx.group, ctx.scattered = x.shape, group, scattered
        if scattered:
            x, arrived = _gather(x, group)
            arrived.wait()
        return rounded_product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, arrived = x, None
        if ctx.scattered and x is not None:
            rows, arrived = _gather(x, ctx.group)
        of_x, sent = None, None
        if weight is not None:
            part = rounded_product(grad, weight.t())
            of_x, sent = _sum(part, ctx.shape, ctx.group, ctx.scattered)
        if arrived is not None:
            arrived.wait()
        of_weight = None if rows is None else rounded_product(grad.t(), rows.t())
        if sent is not None:
            sent.wait()
        return of_x, of_weight, None, None


def _gather(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    """Return all ranks' rows, and what says that they are there."""
    whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    return whole, dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=True)


def _sum(
    part: Tensor, shape: torch.Size, group: dist.ProcessGroup, scattered: bool
) -> tuple[Tensor, Any]:
    """Return this rank's rows of the ranks' sum, or all, and what says that they are there."""
    if not scattered:
        return part, dist.all_reduce(part, group=group, async_op=True)
    mine = part.new_empty(shape)
    return mine, dist.reduce_scatter_tensor(mine, part, group=group, async_op=True)


def column_product(
    x: Tensor, weight: Tensor, group: dist.ProcessGroup, *, scattered: bool
) -> Tensor:
    """Return all rows times this rank's rows of the weight, in FP8: [all rows, out / ranks].

    x [rows, in]: all rows, the same on every rank, or scattered over the ranks; its gradient is
    summed over them. Kept for backward is x as it came. bfloat16; errors as float8_product's.
    """
    result: Tensor = _Column.apply(x, weight, group, scattered)  # type: ignore[no-untyped-call]
    return result
