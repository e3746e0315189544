"""merge, fold and fold_slots against softmax over the union of all keys."""

from itertools import product

import pytest
import torch
from torch import Tensor

from model.attention import Alone, Whole, merge
from model.fold import Piece, fold, fold_slots
from tests.compare import relative
from tests.model.dense import attend, dense_fold, dense_fold_slots

NOTHING = float("-inf")


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pieces(
    sizes: list[int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Queries [Sq, H, K] and disjoint sets of keys and values."""
    q = random(5, 4, 8, dtype=dtype)
    keys = [random(n, 2, 8, dtype=dtype, seed=10 + i) * 3 for i, n in enumerate(sizes)]
    values = [random(n, 2, 8, dtype=dtype, seed=20 + i) for i, n in enumerate(sizes)]
    return q, keys, values


def partial(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attend(q, k, v, torch.ones(q.shape[0], k.shape[0], dtype=torch.bool))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_merge_is_softmax_over_the_union(dtype: torch.dtype, tolerance: float) -> None:
    q, keys, values = pieces([3, 7], dtype)
    out, lse = merge(partial(q, keys[0], values[0]), partial(q, keys[1], values[1]))
    whole = partial(q, torch.cat(keys), torch.cat(values))
    assert out.dtype == lse.dtype == dtype
    assert relative(out, whole[0]) < tolerance
    assert relative(lse, whole[1]) < tolerance


def test_merge_is_associative() -> None:
    q, keys, values = pieces([3, 7, 4])
    a, b, c = (partial(q, k, v) for k, v in zip(keys, values, strict=True))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert relative(left[0], right[0]) < 1e-14
    assert relative(left[1], right[1]) < 1e-14


@pytest.mark.parametrize("side", [0, 1])
def test_merge_with_the_empty_set_changes_no_bit(side: int) -> None:
    q, keys, values = pieces([6], torch.float32)
    some = partial(q, keys[0], values[0])
    empty = (random(*some[0].shape, dtype=torch.float32), torch.full_like(some[1], NOTHING))
    out, lse = merge(empty, some) if side == 0 else merge(some, empty)
    assert torch.equal(out, some[0])
    assert torch.equal(lse, some[1])


def test_merge_of_two_empty_sets_is_empty_and_finite() -> None:
    out, lse = merge(
        (torch.zeros(2, 3), torch.full((2,), NOTHING)),
        (torch.ones(2, 3), torch.full((2,), NOTHING)),
    )
    assert torch.equal(lse, torch.full((2,), NOTHING))
    assert out.isfinite().all()


def test_merge_survives_scores_that_overflow_exp() -> None:
    a, b = (torch.zeros(1, 2), torch.tensor([200.0])), (torch.ones(1, 2), torch.tensor([201.0]))
    out, lse = merge(a, b)
    assert torch.allclose(out, torch.sigmoid(torch.ones(1, 2)))
    assert torch.allclose(lse, torch.tensor([201.3132617]))


def test_merge_of_a_bfloat16_piece_adds_up_in_the_type_of_the_first() -> None:
    a = (torch.zeros(1, 2), torch.tensor([0.0]))
    b = (torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([-8.0]))
    assert torch.allclose(merge(a, b)[0], torch.sigmoid(torch.tensor(-8.0)).expand(1, 2))


@pytest.mark.parametrize("name", ["q", "k0", "v0", "k1", "v1"])
@pytest.mark.parametrize("of", ["out", "lse"])
def test_gradients_flow_through_merge(name: str, of: str) -> None:
    q, keys, values = pieces([3, 7])
    inputs = {"q": q, "k0": keys[0], "k1": keys[1], "v0": values[0], "v1": values[1]}
    x = inputs[name].requires_grad_()
    merged = merge(partial(q, keys[0], values[0]), partial(q, keys[1], values[1]))
    whole = partial(q, torch.cat(keys), torch.cat(values))
    index = 0 if of == "out" else 1
    upstream = random(*merged[index].shape, seed=30)
    if of == "lse" and name.startswith("v"):
        return  # no path: values do not enter lse
    grads = [torch.autograd.grad((r[index] * upstream).sum(), x)[0] for r in (merged, whole)]
    assert grads[1].abs().max() > 0.1
    assert relative(*grads) < 1e-13


CASES = list(product([0, 1, 2], [False, True], [False, True]))
"""Carried segments, hidden ones among them, slots."""


def fold_inputs(
    carried: int, hidden: bool, slots: bool, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tensor | None]:
    batch, count, length, heads, kv_heads, width, num_slots = 2, 3, 5, 4, 2, 8, 3
    inputs = {"q": random(batch, count, length, heads, width, dtype=dtype, seed=1)}
    for seed, name in enumerate(("k", "v")):
        shape = (batch, carried + count, length, kv_heads, width)
        inputs[name] = random(*shape, dtype=dtype, seed=2 + seed)
    if slots:
        for seed, name in enumerate(("slot_k", "slot_v")):
            shape = (batch, count, num_slots, kv_heads, width)
            inputs[name] = random(*shape, dtype=dtype, seed=4 + seed)
    visible = None
    if hidden:
        visible = torch.ones(batch, count, carried, dtype=torch.bool)
        visible[0, 1], visible[1, 0] = False, False
        visible[1, 2, 1:] = False
    return {name: x.requires_grad_() for name, x in inputs.items()}, visible


def run_fold(inputs: dict[str, Tensor], visible: Tensor | None, *, dense: bool) -> Tensor:
    slots = (inputs["slot_k"], inputs["slot_v"]) if "slot_k" in inputs else None
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    if dense:
        return dense_fold(q, k, v, slots, visible)
    extra = [Piece(*slots)] if slots else []
    return fold(q, k, v, pieces=extra, visible=visible, layout=Whole(), exchange=Alone())


@pytest.mark.parametrize(("carried", "hidden", "slots"), CASES)
def test_fold_is_dense_attention(carried: int, hidden: bool, slots: bool) -> None:
    inputs, visible = fold_inputs(carried, hidden, slots)
    expected = run_fold(inputs, visible, dense=True)
    assert relative(run_fold(inputs, visible, dense=False), expected) < 1e-14


@pytest.mark.parametrize(("carried", "hidden", "slots"), CASES)
def test_gradients_of_fold_are_those_of_dense_attention(
    carried: int, hidden: bool, slots: bool
) -> None:
    inputs, visible = fold_inputs(carried, hidden, slots)
    upstream = random(*inputs["q"].shape, seed=9)
    grads = [
        torch.autograd.grad(run_fold(inputs, visible, dense=dense), inputs.values(), upstream)
        for dense in (False, True)
    ]
    errors = {
        name: relative(own, dense)
        for name, own, dense in zip(inputs, grads[0], grads[1], strict=True)
    }
    assert all(dense.abs().max() > 0.1 for dense in grads[1])  # O(1): no error hides as small
    assert all(error < 1e-13 for error in errors.values()), errors


@pytest.mark.parametrize("hidden", [False, True])
def test_fold_in_float32_is_as_good_as_float32(hidden: bool) -> None:
    wide, visible = fold_inputs(2, hidden, True)
    narrow = {name: x.detach().float().requires_grad_() for name, x in wide.items()}
    upstream = random(*wide["q"].shape, seed=9)
    out, expected = run_fold(narrow, visible, dense=False), run_fold(wide, visible, dense=True)
    assert out.dtype == torch.float32
    assert relative(out, expected) < 1e-6
    own = torch.autograd.grad(out, narrow.values(), upstream.float())
    dense = torch.autograd.grad(expected, wide.values(), upstream)
    errors = {n: relative(a, b) for n, a, b in zip(wide, own, dense, strict=True)}
    assert all(error < 2e-6 for error in errors.values()), errors


def test_fold_of_bfloat16_pieces_merges_in_float32() -> None:
    """Seven pieces: were each rounded to bfloat16 (2^-9 each), errors would add up to 1e-2."""
    wide, _ = fold_inputs(2, False, True)
    narrow = {name: x.detach().bfloat16().requires_grad_() for name, x in wide.items()}
    rounded = {name: x.detach().double().requires_grad_() for name, x in narrow.items()}
    upstream = random(*wide["q"].shape, seed=9).bfloat16()
    out, expected = run_fold(narrow, None, dense=False), run_fold(rounded, None, dense=True)
    assert out.dtype == torch.bfloat16
    assert relative(out, expected) < 2**-8
    own = torch.autograd.grad(out, narrow.values(), upstream)
    dense = torch.autograd.grad(expected, rounded.values(), upstream.double())
    errors = {n: relative(a, b) for n, a, b in zip(wide, own, dense, strict=True)}
    assert all(g.dtype == torch.bfloat16 for g in own)
    assert all(error < 2**-6 for error in errors.values()), errors


def test_fold_keeps_nothing_of_the_size_of_the_scores() -> None:
    length, saved = 512, []
    q, k, v = (random(1, 1, length, 1, 4, seed=s).requires_grad_() for s in range(3))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        fold(q, k, v, layout=Whole(), exchange=Alone())
    assert saved and max(saved) == length * 4


def slot_inputs() -> dict[str, Tensor]:
    shapes = {"q": (2, 3, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8)}
    shapes |= {"slot_k": (2, 3, 2, 8), "slot_v": (2, 3, 2, 8)}
    return {
        name: random(*shape, seed=i).requires_grad_()
        for i, (name, shape) in enumerate(shapes.items())
    }


def run_slots(inputs: dict[str, Tensor], *, dense: bool) -> Tensor:
    q, k, v, *slots = inputs.values()
    if dense:
        return dense_fold_slots(q, k, v, (slots[0], slots[1]))
    return fold_slots(q, k, v, pieces=[Piece(*slots)], exchange=Alone())


def test_fold_slots_is_dense_attention() -> None:
    inputs = slot_inputs()
    assert relative(run_slots(inputs, dense=False), run_slots(inputs, dense=True)) < 1e-14


def test_gradients_of_fold_slots_are_those_of_dense_attention() -> None:
    inputs = slot_inputs()
    upstream = random(2, 3, 4, 8, seed=9)
    own, dense = (
        torch.autograd.grad(run_slots(inputs, dense=dense), inputs.values(), upstream)
        for dense in (False, True)
    )
    errors = {n: relative(a, b) for n, a, b in zip(inputs, own, dense, strict=True)}
    assert all(error < 1e-13 for error in errors.values()), errors
