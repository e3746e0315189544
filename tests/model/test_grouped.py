"""Grouped softmax against the paper's definition, written out row by row."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import merge
from model.kernels import Kernel
from model.memory import grouped_softmax as module
from model.memory.grouped import grouped
from model.memory.grouped_softmax import GroupedSoftmax
from tests.compare import relative

EXACT = 1e-10
"""float64: rounding of sums over a few hundred keys is 1e-13 here."""

HEADS = [(1, 1), (4, 2), (6, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(rows: int, keys: int, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, dout = random(2, heads[0], rows, 8), random(2, heads[0], rows, 8, seed=1)
    return q, random(2, heads[1], keys, 8, seed=2), random(2, heads[1], keys, 8, seed=3), dout


def row_weights(scores: Tensor, block: int, row: int | None) -> tuple[Tensor, Tensor]:
    """Return (weights, lse) of one query from its scores [Sk], by section 3.1 of the paper.

    row: its position among the keys; None: all blocks are past ones.
    """
    own = len(scores) // block if row is None else row // block
    landmarks = [b * block + block - 1 for b in range(own)]
    local = [] if row is None else [j for j in range(own * block, row + 1) if j % block < block - 1]
    reads = scores[landmarks + local]
    shared = reads.softmax(0)
    weights = torch.zeros_like(scores)
    for b in range(own):
        tokens = list(range(b * block, b * block + block - 1))
        weights[tokens] = shared[b] * scores[tokens].softmax(0)
    weights[local] = shared[own:]
    return weights, reads.logsumexp(0)


def weights_of(q: Tensor, k: Tensor, block: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the weight of every key [B, H, Sq, Sk] and every row's lse [B, H, Sq]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    rows = [
        row_weights(s, block, i % q.shape[2] if causal else None)
        for i, s in enumerate(scores.flatten(0, 2))
    ]
    weights, lse = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return weights.view_as(scores), lse.view(scores.shape[:3])


def dense(q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool) -> tuple[Tensor, Tensor]:
    weights, lse = weights_of(q, k, block, causal)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), lse


CASES: list[Any] = [(3, 3, 3, h, True) for h in HEADS]  # one block: nothing is past
CASES += [(block, 24, 24, (4, 2), True) for block in (2, 4, 12)]
CASES += [(4, rows, 24, h, False) for rows, h in zip((1, 7, 40), HEADS, strict=True)]
EACH = pytest.mark.parametrize(("block", "rows", "keys", "heads", "causal"), CASES)


@pytest.fixture(params=[1000, 5, 1], autouse=True)
def rows_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", request.param)


@EACH
def test_is_the_papers_definition(
    block: int, rows: int, keys: int, heads: tuple[int, int], causal: bool
) -> None:
    q, k, v, _ = inputs(rows, keys, heads)
    out, lse = GroupedSoftmax(block).forward(q, k, v, causal)
    expected = dense(q, k, v, block, causal)
    assert relative(out, expected[0]) < EXACT
    assert relative(lse, expected[1]) < EXACT


@EACH
def test_gradients_are_the_definitions(
    block: int, rows: int, keys: int, heads: tuple[int, int], causal: bool
) -> None:
    q, k, v, dout = (x.requires_grad_() for x in inputs(rows, keys, heads))
    dlse = random(*q.shape[:3], seed=4)
    expected_out, expected_lse = dense(q, k, v, block, causal)
    expected = torch.autograd.grad(expected_out, (q, k, v), dout, retain_graph=True)
    both = torch.autograd.grad((expected_out, expected_lse), (q, k, v), (dout, dlse))
    kernel: Kernel = GroupedSoftmax(block)
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v, causal)
        grads = kernel.backward(dout, q, k, v, out, lse, causal)
    for own, other in zip(grads, expected, strict=True):
        assert relative(own, other) < EXACT
    through = torch.autograd.grad(grouped(q, k, v, block, causal), (q, k, v), (dout, dlse))
    for own, other in zip(through, both, strict=True):
        assert relative(own, other) < EXACT


def test_pieces_add_up_to_the_whole() -> None:
    """Past keys in one kernel call or two, the own slice in another: forward and backward."""
    block, past = 4, 12
    q, k, v, dout = inputs(24, 24, (4, 2))
    kernel = GroupedSoftmax(block)
    out, lse = kernel.forward(q, k, v, True)
    expected = kernel.backward(dout, q, k, v, out, lse, True)
    rows = slice(past, 24)
    pieces = [(slice(0, 4), False), (slice(4, past), False), (rows, True)]
    folded = (torch.zeros_like(q[:, :, rows]), torch.full_like(lse[:, :, rows], float("-inf")))
    dq = torch.zeros_like(q[:, :, rows])
    first = kernel.backward(
        *(x[:, :, :past] for x in (dout, q, k, v, out, lse)), True
    )  # the rows that only their own slice holds
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dk[:, :, :past], dv[:, :, :past] = first[1:]
    for keys, causal in pieces:
        here = (k[:, :, keys], v[:, :, keys])
        folded = merge(folded, kernel.forward(q[:, :, rows], *here, causal))
        final = (out[:, :, rows], lse[:, :, rows])
        grads = kernel.backward(dout[:, :, rows], q[:, :, rows], *here, *final, causal)
        dq += grads[0]
        dk[:, :, keys] += grads[1]
        dv[:, :, keys] += grads[2]
    assert relative(folded[0], out[:, :, rows]) < EXACT
    assert relative(folded[1], lse[:, :, rows]) < EXACT
    for own, other in zip((dq, dk, dv), (expected[0][:, :, rows], *expected[1:]), strict=True):
        assert relative(own, other) < EXACT


@pytest.mark.parametrize("causal", [False, True])
def test_a_rows_weights_sum_to_one(causal: bool) -> None:
    q, k, v, _ = inputs(24, 24, (4, 2))
    out, _ = GroupedSoftmax(4).forward(q, k, torch.ones_like(v), causal)
    assert relative(out, torch.ones_like(out)) < EXACT


@pytest.mark.parametrize("causal", [False, True])
def test_a_landmarks_value_is_never_read(causal: bool) -> None:
    q, k, v, dout = inputs(24, 24, (4, 2))
    kernel = GroupedSoftmax(4)
    out, lse = kernel.forward(q, k, v, causal)
    dv = kernel.backward(dout, q, k, v, out, lse, causal)[2]
    assert torch.equal(dv[:, :, 3::4], torch.zeros_like(dv[:, :, 3::4]))
    v[:, :, 3::4] = 1e6
    assert torch.equal(kernel.forward(q, k, v, causal)[0], out)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_whose_lse_is_inf_did_not_read(causal: bool) -> None:
    q, k, v, dout = inputs(24, 24, (4, 2))
    kernel = GroupedSoftmax(4)
    out, lse = kernel.forward(q, k, v, causal)
    hidden, none = lse.clone(), dout.clone()
    hidden[:, :, :9], none[:, :, :9] = float("inf"), 0.0
    grads = kernel.backward(dout, q, k, v, out, hidden, causal)
    assert torch.equal(grads[0][:, :, :9], torch.zeros_like(grads[0][:, :, :9]))
    expected = kernel.backward(none, q, k, v, out, lse, causal)
    for own, other in zip(grads, expected, strict=True):
        assert relative(own, other) < EXACT


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2**-7)])
def test_other_types_are_close(dtype: torch.dtype, tolerance: float) -> None:
    """Sums are float32; bfloat16 is rounded once, to 8 bits, where results leave."""
    q, k, v, dout = (x.to(dtype) for x in inputs(24, 24, (4, 2)))
    kernel = GroupedSoftmax(4)
    out, lse = kernel.forward(q, k, v, True)
    exact = kernel.forward(q.double(), k.double(), v.double(), True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert relative(out, exact[0]) < tolerance
    assert relative(lse, exact[1]) < 5e-6
    grads = kernel.backward(dout, q, k, v, out, lse, True)
    wide = [x.double() for x in (dout, q, k, v, out, lse)]
    for own, other in zip(grads, kernel.backward(*wide, True), strict=True):
        assert own.dtype == dtype
        assert relative(own, other) < tolerance


def test_keys_are_whole_blocks() -> None:
    q, k, v, _ = inputs(24, 24, (1, 1))
    with pytest.raises(AssertionError, match="24 keys are no whole blocks of 5"):
        GroupedSoftmax(5).forward(q, k, v, False)
