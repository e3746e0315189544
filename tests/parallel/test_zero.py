"""The engine: who holds which share, restoring it, accumulating, refusing what is not finite."""

import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.mesh import build_mesh
from parallel.zero import ZeroEngine
from tests.compare import assert_each, relative
from tests.ranks import run_ranks

pytestmark = pytest.mark.gloo

EVERY = pytest.mark.parametrize(
    ("stage", "bf16"),
    [pytest.param(s, b, id=f"stage {s} {'bf16' if b else 'fp32'}")
     for s, b in product((1, 2, 3), (False, True))],
)  # fmt: skip

RANKS, LR = 2, 0.01


class Net(nn.Module):
    """Two maps: one that stage 3 cuts, small ones it keeps whole; odd sizes, so that shares pad."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(13, 11), nn.Linear(11, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def make(
    stage: int, bf16: bool, seed: int = 0, scale: float = 3.0, frozen: tuple[str, ...] = ()
) -> ZeroEngine:
    """Return an engine; scale: of the rate of the second map's bias."""
    model = Net(seed)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [model.first.bias], "weight_decay": 0.0},
        {"params": [model.second.bias], "weight_decay": 0.0, "lr_scale": scale},
    ]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    mesh = build_mesh(tp=1, cp=1)
    return ZeroEngine(model, optimizer, mesh, stage=stage, bf16=bf16, clip=0.5, cut_above=100)


def backward(
    engine: ZeroEngine, step: int, *, last: bool = True, times: float = 1.0, rows: Any = None
) -> None:
    """One backward on rows of this rank's own 4 rows of the step's data."""
    generator = torch.Generator().manual_seed(100 * step + engine.mesh.rank)
    x, y = torch.randn(4, 13, generator=generator), torch.randn(4, 3, generator=generator)
    part = slice(None) if rows is None else rows
    dtype = next(engine.engine.module.parameters()).dtype
    out = engine(x[part].to(dtype))
    engine.backward((out.float() - y[part]).square().sum() * times, last=last)


def good_step(engine: ZeroEngine, step: int) -> float:
    backward(engine, step)
    norm = engine.step(LR * (1 + step))
    assert norm is not None
    return norm


def held(engine: ZeroEngine) -> dict[str, Tensor]:
    """This rank's share and the weights it computes with."""
    found = {
        f"{f.name} {kind}": value.clone()
        for f in engine.fragments()
        for kind, value in f.values.items()
    }
    x = torch.ones(1, 13, dtype=next(engine.engine.module.parameters()).dtype)
    with torch.no_grad():
        found["output"] = engine(x)
    return found


def on_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    return run_ranks(RANKS, function, *args)


def shares(stage: int, bf16: bool) -> list[tuple[str, int, dict[str, Tensor]]]:
    engine = make(stage, bf16)
    good_step(engine, 0)
    found = [(f.name, f.start, {k: v.clone() for k, v in f.values.items()})
             for f in engine.fragments()]  # fmt: skip
    weights = {n: _full(p) for n, p in engine.engine.module.named_parameters()}
    return [*found, ("all", 0, weights)]


def _full(parameter: Any) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).clone()


@EVERY
def test_shares_cover_every_element_exactly_once_with_its_master(stage: int, bf16: bool) -> None:
    ranks = on_ranks(shares, stage, bf16)
    weights = ranks[0][-1][2]
    count = {name: torch.zeros(p.numel()) for name, p in weights.items()}
    for *found, _ in ranks:
        for name, start, values in found:
            here = slice(start, start + values["master"].numel())
            count[name][here] += 1
            assert torch.equal(values["master"], weights[name].ravel()[here])
            assert values.keys() == {"master", "exp_avg", "exp_avg_sq"}
            assert {v.dtype for v in values.values()} == {torch.float32}
            assert values["exp_avg_sq"].any()  # of this step, not of padding
    assert count.keys() == dict(Net(0).named_parameters()).keys()
    assert all(torch.equal(c, torch.ones_like(c)) for c in count.values()), count


def both_ranks_share(stage: int, bf16: bool) -> int:
    engine = make(stage, bf16)
    return sum(f.values["master"].numel() for f in engine.fragments())


@EVERY
def test_optimizer_state_is_halved_over_two_ranks(stage: int, bf16: bool) -> None:
    whole = sum(p.numel() for p in Net(0).parameters())
    held_by = on_ranks(both_ranks_share, stage, bf16)
    assert sum(held_by) == whole
    assert max(held_by) < 0.6 * whole


def continue_restored(stage: int, bf16: bool, used: bool) -> None:
    """4 steps equal 2 steps, copy into an engine that trained on something else, 2 steps."""
    engine = make(stage, bf16)
    for step in (0, 1):
        good_step(engine, step)
    saved = {(f.name, f.start): {k: v.clone() for k, v in f.values.items()}
             for f in engine.fragments()}  # fmt: skip
    count = engine.optimizer_step_count()
    fresh = make(stage, bf16, seed=1)
    if used:
        good_step(fresh, 9)
    for fragment in fresh.fragments():
        for kind, value in fragment.values.items():
            value.copy_(saved[fragment.name, fragment.start][kind])
    fresh.restore(count)
    assert count == fresh.optimizer_step_count() == 2
    assert_each(held(fresh), held(engine), 0.0)
    for step in (2, 3):
        assert good_step(fresh, step) == good_step(engine, step)
    assert_each(held(fresh), held(engine), 0.0)


@EVERY
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used before"])
def test_a_restored_engine_goes_on_bit_for_bit(stage: int, bf16: bool, used: bool) -> None:
    on_ranks(continue_restored, stage, bf16, used)


FROZEN = ("first.weight", "first.bias")
"""One that stage 3 cuts and one that it keeps whole."""


def frozen_shares(stage: int, bf16: bool) -> list[tuple[str, int, dict[str, Tensor]]]:
    engine = make(stage, bf16, frozen=FROZEN)
    good_step(engine, 0)
    return [(f.name, f.start, {k: v.clone() for k, v in f.values.items()})
            for f in engine.fragments() if f.name in FROZEN]  # fmt: skip


@EVERY
def test_frozen_parameters_are_shared_out_as_they_began_without_moments(
    stage: int, bf16: bool
) -> None:
    began, left = dict(Net(0).named_parameters()), {name: 0 for name in FROZEN}
    for found in on_ranks(frozen_shares, stage, bf16):
        assert found  # no rank holds nothing
        for name, start, values in found:
            assert values.keys() == {"master"}
            numel = values["master"].numel()
            expected = began[name].detach().ravel()[start : start + numel]
            assert torch.equal(values["master"], expected.to(values["master"].dtype))
            assert start == left[name]  # ranks in order, no gap
            left[name] = start + numel
    assert left == {name: began[name].numel() for name in FROZEN}


def continue_frozen(stage: int, bf16: bool) -> None:
    engine, fresh = (make(stage, bf16, seed=seed, frozen=FROZEN) for seed in (0, 1))
    good_step(engine, 0)
    good_step(fresh, 9)
    for old, new in zip(engine.fragments(), fresh.fragments(), strict=True):
        for kind, value in new.values.items():
            value.copy_(old.values[kind].float())  # as a checkpoint holds them
    fresh.restore(engine.optimizer_step_count())
    assert_each(held(fresh), held(engine), 0.0)
    assert good_step(fresh, 1) == good_step(engine, 1)
    assert_each(held(fresh), held(engine), 0.0)


@EVERY
def test_frozen_parameters_come_back_bit_for_bit(stage: int, bf16: bool) -> None:
    on_ranks(continue_frozen, stage, bf16)


def accumulate(stage: int, bf16: bool) -> None:
    one, many = make(stage, bf16), make(stage, bf16)
    for step in (0, 1):
        backward(one, step)
        if bf16:  # 32 times a 32nd is exact in bfloat16, and so is its sum in float32 alone
            for i in range(32):
                backward(many, step, times=1 / 32, last=i == 31)
        else:
            for i in range(4):
                backward(many, step, rows=slice(i, i + 1), last=i == 3)
        assert many.step(LR) == pytest.approx(one.step(LR), rel=1e-6)
    assert_each(held(many), held(one), 2e-6)


@EVERY
def test_several_backwards_in_one_step_equal_one(stage: int, bf16: bool) -> None:
    on_ranks(accumulate, stage, bf16)


def refuse(stage: int, bf16: bool) -> None:
    """Good, bad, bad, good equals good, good; only rank 1 sees what is not finite."""
    bad, clean = make(stage, bf16), make(stage, bf16)
    good_step(bad, 0), good_step(clean, 0)
    before = held(bad)
    for value, windows in ((float("inf"), 1), (float("nan"), 2)):
        backward(bad, 1, times=value if bad.mesh.rank == 1 else 1.0, last=windows == 1)
        if windows == 2:
            backward(bad, 2)
        assert bad.step(LR) is None
        assert_each(held(bad), before, 0.0)
        assert bad.optimizer_step_count() == 1
    assert good_step(bad, 3) == good_step(clean, 3)
    assert_each(held(bad), held(clean), 0.0)
    moved = held(bad)
    assert all(relative(moved[name], before[name]) > 0 for name in before)


@EVERY
def test_a_gradient_that_is_not_finite_leaves_no_trace(stage: int, bf16: bool) -> None:
    on_ranks(refuse, stage, bf16)


def scaled_moves(stage: int, bf16: bool) -> None:
    """A group's lr_scale multiplies its moves, at every step's rate, and nobody else's."""
    one, many = (make(stage, bf16, scale=scale) for scale in (1.0, 4.0))
    for step in (0, 1):
        moves = []
        for engine in (one, many):
            before = {f.name: f.values["master"].clone() for f in engine.fragments()}
            good_step(engine, step)
            moves.append({f.name: f.values["master"] - before[f.name] for f in engine.fragments()})
        moved = moves[1].pop("second.bias", None), moves[0].pop("second.bias", None)
        if step == 0:
            assert_each(moves[1], moves[0], 0.0)
            if moved[1] is not None:  # of this rank's share
                # of values of about 1 (float32), which moved by 0.01
                assert relative(moved[0], 4 * moved[1]) < 1e-4
    assert {group["lr"] / group.get("lr_scale", 1.0) for group in many.base.param_groups} == {
        2 * LR
    }


@EVERY
def test_a_groups_scale_multiplies_its_rate_at_every_step(stage: int, bf16: bool) -> None:
    on_ranks(scaled_moves, stage, bf16)


def forget_gradients(stage: int, bf16: bool) -> None:
    engine = make(stage, bf16)
    backward(engine, 0)
    first = engine.step(0.0)
    backward(engine, 0)
    assert engine.step(0.0) == first


@EVERY
def test_a_step_begins_without_gradients_of_the_last(stage: int, bf16: bool) -> None:
    on_ranks(forget_gradients, stage, bf16)


def norm_of_step(stage: int, bf16: bool) -> float:
    return good_step(make(stage, bf16), 0)


@EVERY
def test_the_norm_is_of_the_sum_over_ranks_before_clipping(stage: int, bf16: bool) -> None:
    model = Net(0)
    for rank in range(RANKS):
        generator = torch.Generator().manual_seed(rank)
        x, y = torch.randn(4, 13, generator=generator), torch.randn(4, 3, generator=generator)
        (model(x) - y).square().sum().backward()
    expected = torch.cat([p.grad.ravel() for p in model.parameters()]).norm().item()
    assert expected > 10 * 0.5  # the clip
    tolerance = 2**-6 if bf16 else 1e-6
    assert on_ranks(norm_of_step, stage, bf16) == [pytest.approx(expected, rel=tolerance)] * 2


def test_a_rank_does_not_import_mlflow_for_deepspeeds_autotuner() -> None:
    # a process of its own: other tests import mlflow
    code = """
import importlib.util, sys
from parallel.zero import load_deepspeed
assert load_deepspeed("cpu").__name__ == "deepspeed"
assert not {"mlflow", "pyarrow", "scipy"} & set(sys.modules), "imported all the same"
assert importlib.util.find_spec("mlflow") is not None, "still hidden"
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
