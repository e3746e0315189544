"""Both exchanges against full masks in one process: out and each gradient by itself."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.fold import Piece
from model.local import FoldedSequence
from parallel.ring import choose_exchange
from parallel.slicing import choose_layout
from tests.cases import case
from tests.compare import assert_each
from tests.model.compiled_attention import needs_kernel, use_compiled_attention
from tests.model.dense import dense_fold, dense_fold_slots
from tests.ranks import run_ranks

pytestmark = pytest.mark.gloo

SIZES = pytest.mark.parametrize("size", [2, 4])
WAYS = list(product(["ring", "all_gather"], ["zigzag", "contiguous"]))
"""Exchanges and layouts: all in one start of the ranks, which costs more than any."""
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
SEGMENT_LEN = 16


@pytest.fixture(params=[*TOLERANCES, pytest.param("compiled", marks=needs_kernel)], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """`compiled`: float32 by the CPU's attention kernel of our own."""
    if request.param != "compiled":
        return request.param
    use_compiled_attention(monkeypatch)
    return torch.float32


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def fold_inputs(carried: int, slots: bool) -> dict[str, Tensor]:
    """Grouped heads: 4 queries', 2 keys'. `upstream`: an O(1) gradient of the output."""
    batch, count, length = 2, 3, SEGMENT_LEN
    shapes = {
        "q": (batch, count, length, 4, 8),
        "k": (batch, carried + count, length, 2, 8),
        "v": (batch, carried + count, length, 2, 8),
        "upstream": (batch, count, length, 4, 8),
    }
    if slots:
        shapes["slot_k"] = shapes["slot_v"] = (batch, count, 3, 2, 8)
    return {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def visible_of(carried: int) -> Tensor:
    visible = torch.ones(2, 3, carried, dtype=torch.bool)
    visible[0, 1] = visible[1, 0] = False
    visible[1, 2, 1:] = False
    return visible


def output_and_gradients(
    function: Any, inputs: dict[str, Tensor], upstream: Tensor
) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = function(leaves)
    grads = torch.autograd.grad(out, leaves.values(), upstream)
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


CASES = [(0, False), (0, True), (1, True), (2, False), (2, True)]
"""Segments carried from before, slots."""


def every_way(function: Callable[..., Any], dtype: torch.dtype) -> list[Any]:
    """Runs on a rank: what the function returns for each exchange and layout."""
    found = []
    for way in WAYS:
        with case(*way):
            found.append(function(*way, dtype))
    return found


def fold_everything(exchange: str, layout_name: str, dtype: torch.dtype) -> list[Any]:
    """Runs on a rank: every case's output and gradients of its slice."""
    size = dist.get_world_size()
    layout = choose_layout(layout_name, size)
    sequence = FoldedSequence(layout, choose_exchange(exchange, dist.group.WORLD))
    places = sequence.positions(SEGMENT_LEN)
    results = []
    for carried, with_slots in CASES:
        inputs = {
            name: (x if name.startswith("slot") else x[:, :, places]).to(dtype)
            for name, x in fold_inputs(carried, with_slots).items()
        }
        upstream = inputs.pop("upstream")

        def run(x: dict[str, Tensor], carried: int = carried) -> Tensor:
            pieces = [Piece(x["slot_k"], x["slot_v"])] if "slot_k" in x else []
            visible = visible_of(carried)
            return sequence.fold(x["q"], x["k"], x["v"], pieces=pieces, visible=visible)

        results.append((places, output_and_gradients(run, inputs, upstream)))
    return results


def assemble(parts: list[tuple[Tensor, dict[str, Tensor]]], dim: int) -> dict[str, Tensor]:
    """Slices go to their places along dim; gradients of slots are parts of a sum."""
    whole = {}
    for name in parts[0][1]:
        values = [part[name].double() for _, part in parts]
        if name.startswith("slot"):
            whole[name] = torch.stack(values).sum(0)
        else:
            places = torch.cat([places for places, _ in parts])
            whole[name] = torch.cat(values, dim).index_select(dim, places.argsort())
    return whole


@SIZES
def test_token_attention_is_one_processs(size: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(size, every_way, fold_everything, dtype)
    for i, (carried, slots) in enumerate(CASES):
        inputs = fold_inputs(carried, slots)
        upstream = inputs.pop("upstream")

        def dense(x: dict[str, Tensor], carried: int = carried) -> Tensor:
            slots = (x["slot_k"], x["slot_v"]) if "slot_k" in x else None
            return dense_fold(x["q"], x["k"], x["v"], slots, visible_of(carried))

        expected = output_and_gradients(dense, inputs, upstream)
        assert all(x.abs().max() > 0.1 for x in expected.values())
        for n, way in enumerate(WAYS):
            with case(*way, carried, slots):
                actual = assemble([rank[n][i] for rank in ranks], 2)
                assert_each(actual, expected, TOLERANCES[dtype])


def slot_inputs() -> dict[str, Tensor]:
    shapes = {"q": (2, 3, 4, 8), "k": (2, SEGMENT_LEN, 2, 8), "v": (2, SEGMENT_LEN, 2, 8)}
    shapes |= {"slot_k": (2, 3, 2, 8), "slot_v": (2, 3, 2, 8)}
    return {name: random(*s, seed=i) for i, (name, s) in enumerate(shapes.items())}


def upstream_part(rank: int) -> Tensor:
    return random(2, 3, 4, 8, seed=100 + rank)


def fold_slots_everything(exchange: str, layout_name: str, dtype: torch.dtype) -> Any:
    """Runs on a rank. Each gets another part of the upstream gradient; their sum is whole."""
    size, rank = dist.get_world_size(), dist.get_rank()
    layout = choose_layout(layout_name, size)
    sequence = FoldedSequence(layout, choose_exchange(exchange, dist.group.WORLD))
    places = sequence.positions(SEGMENT_LEN)
    inputs = {
        name: (x[:, places] if name in ("k", "v") else x).to(dtype)
        for name, x in slot_inputs().items()
    }

    def run(x: dict[str, Tensor]) -> Tensor:
        pieces = [Piece(x["slot_k"], x["slot_v"])]
        return sequence.fold_slots(x["q"], x["k"], x["v"], pieces=pieces)

    return places, output_and_gradients(run, inputs, upstream_part(rank).to(dtype))


@SIZES
def test_slot_attention_is_one_processs(size: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(size, every_way, fold_slots_everything, dtype)

    def dense(x: dict[str, Tensor]) -> Tensor:
        return dense_fold_slots(x["q"], x["k"], x["v"], (x["slot_k"], x["slot_v"]))

    upstream = torch.stack([upstream_part(rank) for rank in range(size)]).sum(0)
    expected = output_and_gradients(dense, slot_inputs(), upstream)
    for way, found in zip(WAYS, zip(*ranks, strict=True), strict=True):
        with case(*way):
            outs = [result.pop("out") for _, result in found]
            assert all(torch.equal(out, outs[0]) for out in outs)  # replicated: the same bits
            parts = [(places, {f"slot {n}" if n == "q" else n: g for n, g in result.items()})
                     for places, result in found]  # fmt: skip
            actual = assemble(parts, 1) | {"out": outs[0].double()}
            actual["q"] = actual.pop("slot q")
            assert_each(actual, expected, TOLERANCES[dtype])


def bfloat16_gradients(exchange: str) -> dict[str, Tensor]:
    """Runs on a rank: queries read the same keys on every rank, so that dk, dv have many parts."""
    size = dist.get_world_size()
    sequence = FoldedSequence(
        choose_layout("contiguous", size), choose_exchange(exchange, dist.group.WORLD)
    )
    places = sequence.positions(SEGMENT_LEN)
    inputs = {n: x[:, :, places].bfloat16() for n, x in fold_inputs(0, False).items()}
    upstream = inputs.pop("upstream")
    return output_and_gradients(lambda x: sequence.fold(x["q"], x["k"], x["v"]), inputs, upstream)


@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
def test_bfloat16_gradients_come_home_in_bfloat16_close_to_exact(exchange: str) -> None:
    ranks = run_ranks(4, bfloat16_gradients, exchange)
    layout = choose_layout("contiguous", 4)
    parts = [(layout.positions(rank, SEGMENT_LEN), result) for rank, result in enumerate(ranks)]
    assert {x.dtype for _, part in parts for x in part.values()} == {torch.bfloat16}
    inputs = {n: x.bfloat16().double() for n, x in fold_inputs(0, False).items()}
    upstream = inputs.pop("upstream")
    expected = output_and_gradients(lambda x: dense_fold(x["q"], x["k"], x["v"]), inputs, upstream)
    assert_each(assemble(parts, 2), expected, 2**-6)


def sum_of_ranks(exchange: str) -> Tensor:
    rank = dist.get_rank()
    mine = torch.full((3,), 2.0 ** (-8 * (rank > 0)), dtype=torch.bfloat16)
    result = choose_exchange(exchange, dist.group.WORLD).sum(mine)
    assert torch.equal(mine, torch.full_like(mine, 2.0 ** (-8 * (rank > 0))))  # untouched
    return result


@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
def test_sums_of_bfloat16_are_added_in_float32(exchange: str) -> None:
    """1 + 3 / 256 is 1.015625 rounded once; in bfloat16 each summand would vanish."""
    for result in run_ranks(4, sum_of_ranks, exchange):
        assert torch.equal(result, torch.full((3,), 1 + 3 / 256).bfloat16())
