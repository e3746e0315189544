"""Grouped softmax by the fastest kernel there is: for a fold's pieces, and by itself."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.memory.grouped_softmax import GroupedSoftmax


def choose_grouped(q: Tensor, block: int) -> GroupedSoftmax:
    """Return the fastest kernel that takes q's device and type, and such blocks."""
    if fuses(q.device.type, q.dtype, q.shape[-1], block) and find_spec("triton"):
        from model.memory.grouped_triton import GroupedTriton

        return GroupedTriton(block)
    return GroupedSoftmax(block)


def fuses(device: str, dtype: torch.dtype, head_dim: int, block: int) -> bool:
    """Return whether a device ("cuda", "cpu") takes such blocks in one kernel, without scores."""
    most = 64 if dtype == torch.float32 else 128  # what a multiprocessor's shared memory holds
    fits = block <= most and 16 <= head_dim <= most and head_dim & (head_dim - 1) == 0
    return device == "cuda" and dtype != torch.float64 and fits


class GroupedKernel:
    """A model.kernels.Kernel over blocks of `block` positions: what choose_grouped names."""

    def __init__(self, block: int) -> None:
        self.block = block

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return (out, lse); see GroupedSoftmax."""
        return choose_grouped(q, self.block).forward(q, k, v, causal)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv of this piece, given the fold's final out and lse."""
        return choose_grouped(q, self.block).backward(dout, q, k, v, out, lse, causal)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = choose_grouped(q, block).forward(q, k, v, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.block, ctx.causal = block, causal
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        said = (dout.to(lse.dtype) * out).sum(-1) - dlse
        kernel = choose_grouped(q, ctx.block)
        grads = kernel.backward_of_both(dout, q, k, v, said, lse, ctx.causal)
        return *grads, None, None


def grouped(q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of GroupedSoftmax.forward; gradients flow through both.

    For pieces joined outside model.fold, as those of retrieval are. q [B, H, Sq, K];
    k, v [B, Hkv, Sk, K].
    """
    result: tuple[Tensor, Tensor] = _Grouped.apply(q, k, v, block, causal)  # type: ignore[no-untyped-call]
    return result
