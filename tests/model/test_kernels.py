"""The fused CPU kernel against its slow twin."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import kernels
from model.kernels import Blockwise, CpuFlash, choose_kernel
from tests.compare import relative
from tests.model.dense import attend

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-6}
"""Rounding of sums over up to 600 keys; bfloat16 has 8 bits, and p is rounded before p @ v."""


def tolerance(kernel: Any, dtype: torch.dtype) -> float:
    """The slow twin rounds scores to bfloat16 too, before softmax: twice the fused one's."""
    rounds_scores = isinstance(kernel, Blockwise) and dtype == torch.bfloat16
    return TOLERANCES[dtype] * (2 if rounds_scores else 1)


SIZES = [(1, 1), (7, 3), (33, 33), (70, 515), (260, 600)]
"""Rows and keys around the fused kernel's blocks of 32 and 512 and the slow twin's of 256."""

HEADS = [(1, 1), (4, 2), (6, 1)]


def inputs(
    rows: int, keys: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = (2, kv_heads, keys, 8)
    q, dout = random(2, heads, rows, 8), random(2, heads, rows, 8)
    return q, random(*shape), random(*shape), dout


def cases() -> list[Any]:
    found = [(s, (4, 2), torch.float64, False) for s in SIZES]
    found += [((s, s), h, torch.float64, True) for s in (1, 33, 260) for h in HEADS]
    for dtype in (torch.float32, torch.bfloat16):
        found += [((70, 515), (4, 2), dtype, False), ((260, 260), (6, 1), dtype, True)]
    return found


KERNELS = pytest.mark.parametrize("kernel", [CpuFlash(), Blockwise()], ids=["fused", "slow"])


@KERNELS
@pytest.mark.parametrize(("size", "heads", "dtype", "causal"), cases())
def test_forward_is_the_slow_twins_in_float64(
    kernel: Any, size: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype, causal: bool
) -> None:
    q, k, v, _ = inputs(*size, *heads, dtype)
    out, lse = kernel.forward(q, k, v, causal)
    exact_out, exact_lse = Blockwise().forward(q.double(), k.double(), v.double(), causal)
    assert out.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert relative(out, exact_out) < tolerance(kernel, dtype)
    assert relative(lse, exact_lse) < tolerance(kernel, dtype)


@KERNELS
@pytest.mark.parametrize(("size", "heads", "dtype", "causal"), cases())
def test_backward_is_the_slow_twins_in_float64(
    kernel: Any, size: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype, causal: bool
) -> None:
    """As a piece of a fold: the final lse is larger than this piece's, the final out other."""
    q, k, v, dout = inputs(*size, *heads, dtype)
    out, lse = kernel.forward(q, k, v, causal)
    out, lse = out * 0.5, lse + 1.0
    grads = kernel.backward(dout, q, k, v, out, lse, causal)
    assert [g.dtype for g in grads] == [dtype] * 3
    exact = Blockwise().backward(*(x.double() for x in (dout, q, k, v, out, lse)), causal)
    errors = [relative(a, b) for a, b in zip(grads, exact, strict=True)]
    assert max(errors) < tolerance(kernel, dtype), errors


@KERNELS
@pytest.mark.parametrize("causal", [False, True])
def test_both_are_dense_attention_by_autograd(kernel: Any, causal: bool) -> None:
    q, k, v, dout = (x.requires_grad_() for x in inputs(33, 33, 4, 2, torch.float64))
    mask = torch.ones(33, 33, dtype=torch.bool)
    dense, dense_lse = attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask.tril() if causal else mask
    )
    expected = torch.autograd.grad(dense, (q, k, v), dout.transpose(1, 2))
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v, causal)
        grads = kernel.backward(dout, q, k, v, out, lse, causal)
    assert relative(out, dense.transpose(1, 2)) < 1e-14
    assert relative(lse, dense_lse.transpose(1, 2)) < 1e-14
    assert max(relative(a, b) for a, b in zip(grads, expected, strict=True)) < 1e-13


@KERNELS
def test_pieces_with_the_folds_lse_add_up(kernel: Any) -> None:
    """Two halves of the keys, each given the whole's (out, lse): dq adds up, dk and dv join."""
    q, k, v, dout = inputs(9, 20, 4, 2, torch.float64)
    out, lse = kernel.forward(q, k, v, False)
    whole = kernel.backward(dout, q, k, v, out, lse, False)
    parts = [
        kernel.backward(dout, q, k[:, :, half], v[:, :, half], out, lse, False)
        for half in (slice(0, 8), slice(8, 20))
    ]
    assert relative(parts[0][0] + parts[1][0], whole[0]) < 1e-13
    for i in (1, 2):
        assert relative(torch.cat((parts[0][i], parts[1][i]), 2), whole[i]) < 1e-13


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_whose_lse_is_inf_did_not_read(kernel: Any, dtype: torch.dtype) -> None:
    q, k, v, dout = inputs(40, 40, 4, 2, dtype)
    out, lse = kernel.forward(q, k, v, False)
    hidden = lse.clone()
    hidden[:, :, :17] = float("inf")
    dq, dk, dv = kernel.backward(dout, q, k, v, out, hidden, False)
    rest = slice(17, None)
    others = (x[:, :, rest] for x in (dout, q))
    expected = kernel.backward(*others, k, v, out[:, :, rest], lse[:, :, rest], False)
    assert torch.equal(dq[:, :, :17], torch.zeros_like(dq[:, :, :17]))
    for own, other in ((dq[:, :, rest], expected[0]), (dk, expected[1]), (dv, expected[2])):
        assert relative(own, other) < tolerance(kernel, dtype)


class _Largest(TorchDispatchMode):
    """Records the most elements any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_blockwise_never_holds_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blockwise, "rows", 16)
    q, k, v, dout = inputs(200, 200, 2, 1, torch.float32)
    with _Largest() as largest:
        out, lse = Blockwise().forward(q, k, v, True)
        Blockwise().backward(dout, q, k, v, out, lse, True)
    assert largest.numel == 2 * 2 * 16 * 200


def test_the_cpu_gets_the_fused_kernel() -> None:
    assert isinstance(choose_kernel(torch.zeros(1)), CpuFlash)


def test_rows_that_begin_between_16_bytes_are_copied_for_a_gpu() -> None:
    x = torch.zeros(1, 4, 6, 24, dtype=torch.bfloat16)
    for whole in (x, x[..., 8:16], x[:, :, 1:], x.transpose(1, 2)):
        assert kernels._aligned(whole) is whole
    for between in (x[..., 4:12], torch.zeros(1, 4, 6, 12, dtype=torch.bfloat16)[..., :8]):
        copied = kernels._aligned(between)
        assert copied.is_contiguous() and torch.equal(copied, between)
        assert copied.data_ptr() != between.data_ptr()
