"""Matrix products of linear maps in FP8: factors in float8, sums in float32, results in bfloat16.

Each row of the left factor and each column of the right one has a scale of its own (rowwise
scaling; Micikevicius et al. 2022, FP8 formats for deep learning; Fishman et al. 2024 on why one
scale a tensor drowns in outliers). Scales are powers of two, so scaling itself rounds nothing: a
number keeps four significant bits, whatever its row's largest is, unless that is 2^14 times as
large. So it does not matter which of a row's or column's numbers a rank holds; a layout changes
what bfloat16 rounds, and through it where some numbers are rounded to.

Of a map's three products (result, gradient of its rows, gradient of its weight) each rounds its own
two factors anew, along what it sums over. What is kept for backward is what is kept without FP8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import ScalingType

from model.compiled import fused

MULTIPLE = 16
"""What a GPU's FP8 products want features to be a multiple of."""

_TYPE = torch.float8_e4m3fn  # with a scale a row gradients need no wider range (e5m2)
_EXPONENT = 0x7F800000  # of a float32


def float8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T in FP8, x [rows, in], weight [out, in], both bfloat16: [rows, out].

    Raises RuntimeError on a GPU where in or out is no multiple of 16, or that has no FP8.
    """
    result: Tensor = _Float8.apply(x, weight)  # type: ignore[no-untyped-call]
    return result


class _Float8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return rounded_product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        of_x = rounded_product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = rounded_product(grad.t(), x.t()) if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.T [m, n] of a [m, k] and b [n, k], each row of both rounded by its own scale."""
    (a8, of_a), (b8, of_b) = rounded(a), rounded(b)
    return functional.scaled_mm(
        a8, b8.t(), of_a, ScalingType.RowWise, of_b.t(), ScalingType.RowWise,
        output_dtype=a.dtype, use_fast_accum=a.is_cuda,
    )  # fmt: skip


@fused
def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [n, k] in float8 [n, k'] and what its rows are to be multiplied by [n, 1] float32.

    k' is k or, zeros behind it, the next multiple of 16. Scales are the largest powers of two that
    leave a row within 448 = 1.75 * 256, float8's largest. A row that holds inf or nan is nan.
    """
    x = functional.pad(x, (0, -x.shape[1] % MULTIPLE)).float()
    largest = x.abs().amax(1, keepdim=True).clamp(min=1e-30)  # rows of zeros stay zeros
    # Its power of two by its bits: a GPU's log2 and exp2 are not exact.
    power = (largest.view(torch.int32) & _EXPONENT).view(torch.float32)
    scale = torch.where(largest <= 1.75 * power, 256.0, 128.0) / power
    return (x * scale).to(_TYPE).contiguous(), 1.0 / scale


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
