"""Matrix products of linear maps in FP8: factors in float8, results in bfloat16.

Each row of the left factor and each column of the right one has a scale of its own (rowwise
scaling; Micikevicius et al. 2022, FP8 formats for deep learning; Fishman et al. 2024 on why one
scale a tensor drowns in outliers). Scales are powers of two, so scaling itself rounds nothing: a
number keeps four significant bits, whatever its row's largest is, unless that is 2^14 times as
large. So it does not matter which of a row's or column's numbers a rank holds; a layout changes
what bfloat16 rounds, and through it where some numbers are rounded to.

Of a map's three products (result, gradient of its rows, gradient of its weight) each rounds its own
two factors anew, along what it sums over. Sums are float32 on a CPU; on Hopper they are the tensor
core's own, of fewer bits (use_fast_accum, without which its rowwise products are slow). What is
kept for backward is what is kept without FP8.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.functional import ScalingType

from model.compiled import fused
from model.config import FP8_MULTIPLE
from model.deferred import deferred_product, defers

_TYPE = torch.float8_e4m3fn  # with a scale a row gradients need no wider range (e5m2)
_MANTISSA = (1 << 23) - 1  # of a float32
_QUARTERS = 3 << 21  # a mantissa of 1.75: float8's largest is 448 = 1.75 * 2^8


def float8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T in FP8, x [rows, in], weight [out, in], both bfloat16: [rows, out].

    Raises TypeError for other types, and on a GPU as torch does: where in or out is no
    multiple of 16, or the GPU has no FP8.
    """
    if defers(weight):
        return deferred_product(x, weight, rounded_product)
    result: Tensor = _Float8.apply(x, weight)  # type: ignore[no-untyped-call]
    return result


class _Float8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        for_x, for_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return rounded_product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = None if weight is None else rounded_product(grad, weight.t())
        of_weight = None if x is None else rounded_product(grad.t(), x.t())
        return of_x, of_weight


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.T [m, n] of a [m, k] and b [n, k], each row of both rounded by its own scale.

    Both bfloat16; without gradient. Raises TypeError for other types.
    """
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        raise TypeError(f"FP8 products are of bfloat16, not of {a.dtype} and {b.dtype}")
    if a.shape[1] == 0:
        return a.new_zeros(a.shape[0], b.shape[0])
    # Detached: the compiler makes a kernel for each shape of a parameter, for others one for all.
    (a8, of_a), (b8, of_b) = rounded(a.detach()), rounded(b.detach())
    if not a.is_cuda and not _multiplies_on_cpu():
        return ((a8.float() * of_a) @ (b8.float() * of_b).t()).to(a.dtype)
    return functional.scaled_mm(
        a8, b8.t(), of_a, ScalingType.RowWise, of_b.t(), ScalingType.RowWise,
        output_dtype=a.dtype, use_fast_accum=a.is_cuda,
    )  # fmt: skip


@functools.cache
def _multiplies_on_cpu() -> bool:
    """Return whether torch has this product for a CPU: 2.13 has, 2.11 has not."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU")


@fused
def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [n, k] in float8 [n, k'] and what its rows are to be multiplied by [n, 1] float32.

    k' is k or, zeros behind it, the next multiple of 16. Scales are the largest powers of two that
    leave a row within float8's range, by their bits: a GPU's log2, exp2 and division are not exact.
    A row that holds inf or nan is nan.
    """
    if x.shape[1] % FP8_MULTIPLE:
        x = functional.pad(x, (0, -x.shape[1] % FP8_MULTIPLE))
    largest = torch.linalg.vector_norm(x, float("inf"), 1, keepdim=True).float()
    bits = largest.clamp(min=1e-30).view(torch.int32)  # rows of zeros stay zeros
    exponent, up = bits >> 23, 8 - (bits & _MANTISSA > _QUARTERS).int()
    scale, back = ((254 + up - exponent) << 23), ((exponent - up) << 23)
    scale = torch.where(largest.isfinite(), scale.view(torch.float32), float("nan"))
    # No number is rounded before it is float8: powers of two are bfloat16 too.
    return (x * scale.to(x.dtype)).to(_TYPE).contiguous(), back.view(torch.float32)


def check_float8(device: torch.device) -> None:
    """Raise ValueError for a GPU that has no FP8."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(
            f"train.fp8 needs a GPU of compute capability 8.9 or later, and"
            f" {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; leave it"
            " out"
        )


class Float8Linear(nn.Linear):
    """A linear map whose products are in FP8."""

    def forward(self, x: Tensor) -> Tensor:
        """X [rows, in] -> [rows, out]."""
        result = float8_product(x, self.weight)
        return result if self.bias is None else result + self.bias
