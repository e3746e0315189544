"""MegatronLinears on two ranks against LocalLinears, and the map of who holds what."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from model.interfaces import Linears
from model.layers import scattered
from model.local import LocalLinears
from model.loss import IGNORE, Columns, become_gradient, columns_of, cross_entropy
from parallel.mesh import Mesh, build_mesh
from parallel.tensor import Cut, MegatronLinears, cut_of, sum_scattered_gradients
from tests.compare import assert_each, relative
from tests.ranks import run_ranks

ROWS, WIDTH, FEATURES, VOCAB, PADDED = 6, 8, 12, 50, 64

SEQUENCE_PARALLEL = pytest.mark.parametrize("sp", [False, True], ids=["whole rows", "scattered"])

ROUNDING = 1e-6
"""float32, sums of at most 64 terms in another order."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("cut", [Cut(None, 1), Cut(0, 1), Cut(1, 1), Cut(0, 2), Cut(1, 2)], ids=str)
def test_join_is_the_inverse_of_take(tp: int, cut: Cut) -> None:
    whole = torch.arange(16 * 8).view(16, 8)
    parts = [cut.take(whole, tp, rank) for rank in range(tp)]
    assert torch.equal(cut.join(parts), whole)
    for part in parts:
        assert cut.whole_shape(part.shape, tp) == whole.shape


def test_a_part_of_two_stacked_matrices_has_rows_of_both() -> None:
    whole = torch.arange(8).view(8, 1)
    assert Cut(0, 2).take(whole, 2, 0).ravel().tolist() == [0, 1, 4, 5]
    assert Cut(0, 2).take(whole, 2, 1).ravel().tolist() == [2, 3, 6, 7]


def test_a_parameter_without_marks_is_whole() -> None:
    assert cut_of(nn.Parameter(torch.ones(3))) == Cut(None, 1)


class Case(NamedTuple):
    """One module with an input and an upstream gradient, all over all ranks."""

    x: Tensor
    upstream: Tensor
    x_cut: str  # how the input lies on ranks: "rows" (with sequence parallelism), "columns", ""
    out_cut: str  # how the output does


CASES = {
    "column": Case(random(ROWS, WIDTH, seed=1), random(ROWS, FEATURES, seed=2), "rows", "columns"),
    "gate_up": Case(
        random(ROWS, WIDTH, seed=3), random(ROWS, 2 * FEATURES, seed=4), "rows", "stacked"
    ),
    "row": Case(random(ROWS, WIDTH, seed=5), random(ROWS, FEATURES, seed=6), "columns", "rows"),
    "embedding": Case(
        torch.tensor([0, 31, 32, 49, 7, 7]), random(ROWS, WIDTH, seed=7), "", "rows"
    ),
}  # fmt: skip


def make(linears: Linears, name: str, *, fp8: bool = False) -> nn.Module:
    match name:
        case "column":
            return linears.column(WIDTH, FEATURES, fp8=fp8)
        case "gate_up":
            return linears.column(WIDTH, 2 * FEATURES, stride=2, fp8=fp8)
        case "row":
            return linears.row(WIDTH, FEATURES, fp8=fp8)
        case _:
            return linears.embedding(PADDED, WIDTH)


def weight_of(name: str, shape: torch.Size) -> Tensor:
    return random(*shape, seed=8 + list(CASES).index(name))


def slice_of(x: Tensor, how: str, mesh: Mesh, sp: bool) -> Tensor:
    match how:
        case "rows" if sp:
            return x.chunk(mesh.tp, 0)[mesh.tp_rank]
        case "columns":
            return x.chunk(mesh.tp, 1)[mesh.tp_rank]
        case "stacked":
            return Cut(1, 2).take(x, mesh.tp, mesh.tp_rank)
        case _:
            return x


def run_module(module: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    x = x.clone().contiguous()
    if x.is_floating_point():
        x.requires_grad_()
    out = module(x)
    out.backward(upstream)
    found = {"out": out.detach(), "dweight": module.weight.grad}
    return found | ({"dx": x.grad} if x.grad is not None else {})


def modules_on_a_rank(sp: bool) -> dict[str, float]:
    """Return how far each result is from its slice of the plain module's."""
    mesh = build_mesh(tp=2, cp=1)
    linears = MegatronLinears(mesh, sequence_parallel=sp, dtype=torch.float32)
    errors = {}
    for name, case in CASES.items():
        plain, module = make(LocalLinears(), name), make(linears, name)
        cut = cut_of(module.weight)
        assert cut.whole_shape(module.weight.shape, 2) == plain.weight.shape
        plain.weight.data = weight_of(name, plain.weight.shape)
        module.weight.data.copy_(cut.take(plain.weight.data, 2, mesh.tp_rank))
        expected = run_module(plain, case.x, case.upstream)
        actual = run_module(
            module,
            slice_of(case.x, case.x_cut, mesh, sp),
            slice_of(case.upstream, case.out_cut, mesh, sp),
        )
        expected["out"] = slice_of(expected["out"], case.out_cut, mesh, sp)
        expected["dweight"] = cut.take(expected["dweight"], 2, mesh.tp_rank)
        if "dx" in expected:
            expected["dx"] = slice_of(expected["dx"], case.x_cut, mesh, sp)
        assert actual.keys() == expected.keys()
        errors |= {f"{name} {key}": relative(actual[key], expected[key]) for key in expected}
    return errors


@pytest.mark.gloo
@SEQUENCE_PARALLEL
def test_linear_maps_and_embedding_are_the_plain_ones(sp: bool) -> None:
    """Output, input gradient and weight gradient of each, on every rank."""
    for errors in run_ranks(2, modules_on_a_rank, sp):
        assert len(errors) == 11
        assert max(errors.values()) < ROUNDING, errors


def cross_entropy_on_a_rank() -> dict[str, float]:
    mesh = build_mesh(tp=2, cp=1)
    linears = MegatronLinears(mesh, sequence_parallel=False, dtype=torch.float32)
    whole = 4 * random(ROWS, PADDED, seed=20)
    whole[:, VOCAB:] = 50.0  # padding that would take all probability
    labels, upstream = torch.tensor([0, 31, 32, 49, 7, IGNORE]), random(ROWS, seed=21)
    upstream[labels == IGNORE] = 0
    (expected, expected_gradient), (loss, gradient) = (
        loss_and_gradient(
            logits.clone(), labels, upstream, columns_of(each, logits.shape[1], VOCAB)
        )
        for each, logits in ((LocalLinears(), whole), (linears, whole.chunk(2, 1)[mesh.tp_rank]))
    )
    return {
        "loss": relative(loss, expected),
        "dlogits": relative(gradient, expected_gradient.chunk(2, 1)[mesh.tp_rank]),
        "padding": float(gradient[:, VOCAB - 32 :].abs().max()) if mesh.tp_rank else 0.0,
    }


def loss_and_gradient(
    logits: Tensor, labels: Tensor, weight: Tensor, columns: Columns
) -> tuple[Tensor, Tensor]:
    loss, lse = cross_entropy(logits, labels, columns)
    become_gradient(logits, labels, columns, loss, lse, weight)
    return loss, logits


@pytest.mark.gloo
def test_cross_entropy_over_a_cut_vocabulary_is_the_plain_one() -> None:
    for errors in run_ranks(2, cross_entropy_on_a_rank):
        assert errors["padding"] == 0
        assert max(errors.values()) < ROUNDING, errors


def rows_on_a_rank(sp: bool) -> dict[str, Any]:
    """What scatter, gather and enter return, and the gradient they hand back."""
    mesh = build_mesh(tp=2, cp=1)
    linears = MegatronLinears(mesh, sequence_parallel=sp, dtype=torch.float32)
    whole = random(ROWS, WIDTH, seed=30)
    mine = linears.scatter(whole).detach()
    results = {}
    for name, x in (("scatter", whole), ("gather", mine), ("enter", mine)):
        x = x.clone().requires_grad_()
        out = getattr(linears, name)(x)
        # A different upstream gradient on each rank tells a sum from a slice.
        out.backward(random(*out.shape, seed=40 + mesh.tp_rank))
        results[name] = (out.detach(), x.grad)
    return results


@pytest.mark.gloo
def test_rows_are_scattered_and_gathered() -> None:
    whole, ranks = random(ROWS, WIDTH, seed=30), run_ranks(2, rows_on_a_rank, True)
    parts, upstream = whole.chunk(2), [random(ROWS, WIDTH, seed=40 + r) for r in range(2)]
    small = torch.cat([random(ROWS // 2, WIDTH, seed=40 + r) for r in range(2)])
    for rank, found in enumerate(ranks):
        assert torch.equal(found["scatter"][0], parts[rank])
        assert torch.equal(found["scatter"][1], small)  # replicated: whole on every rank
        assert torch.equal(found["gather"][0], whole)
        assert torch.equal(found["gather"][1], upstream[rank].chunk(2)[rank])  # its holder's
        assert torch.equal(found["enter"][0], whole)
        total = (upstream[0] + upstream[1]).chunk(2)[rank]
        assert relative(found["enter"][1], total) < ROUNDING  # partial on each: summed


@pytest.mark.gloo
def test_without_sequence_parallelism_rows_stay_whole() -> None:
    whole, ranks = random(ROWS, WIDTH, seed=30), run_ranks(2, rows_on_a_rank, False)
    upstream = [random(ROWS, WIDTH, seed=40 + r) for r in range(2)]
    for rank, found in enumerate(ranks):
        for name in ("scatter", "gather"):
            assert torch.equal(found[name][0], whole)
            assert torch.equal(found[name][1], upstream[rank])
        assert torch.equal(found["enter"][0], whole)
        assert relative(found["enter"][1], upstream[0] + upstream[1]) < ROUNDING


def summed_on_a_rank() -> dict[str, Tensor]:
    mesh = build_mesh(tp=2, cp=1)
    model = nn.Module()
    model.met_scattered_rows = scattered(nn.Parameter(torch.ones(3)))
    model.met_all_rows = nn.Parameter(torch.ones(3))
    sum_scattered_gradients(model, mesh)
    loss = sum((p * (mesh.tp_rank + 1.0)).sum() for p in model.parameters())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.gloo
def test_only_gradients_of_parameters_that_met_scattered_rows_are_summed() -> None:
    for rank, grads in enumerate(run_ranks(2, summed_on_a_rank)):
        expected = {"met_scattered_rows": 3.0, "met_all_rows": rank + 1.0}
        assert_each(grads, {n: torch.full((3,), x) for n, x in expected.items()}, 0.0)


def fp8_maps_on_a_rank(sp: bool) -> dict[str, tuple[float, bool]]:
    """How far each map's results in FP8 are from the plain module's, and whether x is kept whole.

    Of integers that FP8 and bfloat16 hold, whose sums they hold too: whatever is cut is exact.
    """
    mesh = build_mesh(tp=2, cp=1)
    linears = MegatronLinears(mesh, sequence_parallel=sp, dtype=torch.bfloat16)
    found = {}
    for name in ("column", "gate_up", "row"):
        case, plain = CASES[name], make(LocalLinears(), name).bfloat16()
        x, upstream = integers(case.x), integers(case.upstream)
        plain.weight.data = integers(plain.weight)
        module = make(linears, name, fp8=True)
        cut = cut_of(module.weight)
        module.weight.data.copy_(cut.take(plain.weight.data, 2, mesh.tp_rank))
        expected = run_module(plain, x, upstream)
        here = slice_of(x, case.x_cut, mesh, sp)
        actual = run_module(module, here, slice_of(upstream, case.out_cut, mesh, sp))
        expected["out"] = slice_of(expected["out"], case.out_cut, mesh, sp)
        expected["dweight"] = cut.take(expected["dweight"], 2, mesh.tp_rank)
        expected["dx"] = slice_of(expected["dx"], case.x_cut, mesh, sp)
        kept = rows_kept(module, here)
        found |= {f"{name} {key}": (relative(actual[key], expected[key]), kept) for key in expected}
    return found


def integers(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(like.numel())
    return torch.randint(-2, 3, like.shape, generator=generator).bfloat16()


def rows_kept(module: nn.Module, x: Tensor) -> bool:
    """Whether what a map keeps of x for its backward is x as it came."""
    kept: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        module(x.requires_grad_())
    return kept[0].shape == x.shape


@pytest.mark.gloo
@SEQUENCE_PARALLEL
def test_linear_maps_in_fp8_are_the_plain_ones_and_keep_their_own_rows(sp: bool) -> None:
    for found in run_ranks(2, fp8_maps_on_a_rank, sp):
        assert len(found) == 9
        assert set(found.values()) == {(0.0, True)}, found
