"""The engine: who holds which share, restoring it, accumulating, refusing what is not finite."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from parallel.mesh import build_mesh
from parallel.zero import ZeroEngine
from tests.cases import case
from tests.compare import assert_each, relative
from tests.ranks import run_ranks

pytestmark = pytest.mark.gloo

EVERY = [pytest.param((s, b), id=f"stage {s} {'bf16' if b else 'fp32'}")
         for s, b in product((1, 2, 3), (False, True))]  # fmt: skip

RANKS, LR = 2, 0.01


class Probes(NamedTuple):
    """What every probe (below) found on each rank."""

    bf16: bool
    of: dict[str, list[Any]]


@pytest.fixture(scope="module", params=EVERY)
def probes(request: pytest.FixtureRequest) -> Probes:
    """All probes of one stage and precision in one start of the ranks; the one that fails is named.

    A start costs more than any of them.
    """
    ranks = run_ranks(RANKS, probe, *request.param)
    return Probes(request.param[1], {name: [rank[name] for rank in ranks] for name in PROBES})


def probe(stage: int, bf16: bool) -> dict[str, Any]:
    found = {}
    for name, function in PROBES.items():
        with case(name):
            found[name] = function(stage, bf16)
    return found


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


def test_shares_cover_every_element_exactly_once_with_its_master(probes: Probes) -> None:
    ranks = probes.of["shares"]
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


def share_of_state(stage: int, bf16: bool) -> int:
    engine = make(stage, bf16)
    return sum(f.values["master"].numel() for f in engine.fragments())


def test_optimizer_state_is_halved_over_two_ranks(probes: Probes) -> None:
    whole = sum(p.numel() for p in Net(0).parameters())
    held_by = probes.of["share of state"]
    assert sum(held_by) == whole
    assert max(held_by) < 0.6 * whole


class Pair(NamedTuple):
    """What two engines have that should be the same: now and some steps later."""

    counts: tuple[int, int]
    now: list[dict[str, Tensor]]
    norms: list[list[float]]
    later: list[dict[str, Tensor]]

    def assert_same_bits(self) -> None:
        assert self.counts[0] == self.counts[1]
        assert_each(*self.now, 0.0)
        assert self.norms[0] == self.norms[1]
        assert_each(*self.later, 0.0)


def go_on(fresh: ZeroEngine, engine: ZeroEngine, *steps: int) -> Pair:
    engines = (fresh, engine)
    return Pair(
        (fresh.optimizer_step_count(), engine.optimizer_step_count()),
        [held(e) for e in engines],
        [[good_step(e, step) for step in steps] for e in engines],
        [held(e) for e in engines],
    )


def continue_restored(stage: int, bf16: bool, used: bool) -> Pair:
    """4 steps, and 2 steps, copy into an engine that trained on something else, 2 steps."""
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
    return go_on(fresh, engine, 2, 3)


@pytest.mark.parametrize("engine", ["fresh", "used"])
def test_a_restored_engine_goes_on_bit_for_bit(probes: Probes, engine: str) -> None:
    for rank in probes.of[f"continue {engine}"]:
        assert rank.counts[0] == 2
        rank.assert_same_bits()


FROZEN = ("first.weight", "first.bias")
"""One that stage 3 cuts and one that it keeps whole."""


def frozen_shares(stage: int, bf16: bool) -> list[tuple[str, int, dict[str, Tensor]]]:
    engine = make(stage, bf16, frozen=FROZEN)
    good_step(engine, 0)
    return [(f.name, f.start, {k: v.clone() for k, v in f.values.items()})
            for f in engine.fragments() if f.name in FROZEN]  # fmt: skip


def test_frozen_parameters_are_shared_out_as_they_began_without_moments(probes: Probes) -> None:
    began, left = dict(Net(0).named_parameters()), {name: 0 for name in FROZEN}
    for found in probes.of["frozen shares"]:
        assert found  # no rank holds nothing
        for name, start, values in found:
            assert values.keys() == {"master"}
            numel = values["master"].numel()
            expected = began[name].detach().ravel()[start : start + numel]
            assert torch.equal(values["master"], expected.to(values["master"].dtype))
            assert start == left[name]  # ranks in order, no gap
            left[name] = start + numel
    assert left == {name: began[name].numel() for name in FROZEN}


def continue_frozen(stage: int, bf16: bool) -> Pair:
    engine, fresh = (make(stage, bf16, seed=seed, frozen=FROZEN) for seed in (0, 1))
    good_step(engine, 0)
    good_step(fresh, 9)
    for old, new in zip(engine.fragments(), fresh.fragments(), strict=True):
        for kind, value in new.values.items():
            value.copy_(old.values[kind].float())  # as a checkpoint holds them
    fresh.restore(engine.optimizer_step_count())
    return go_on(fresh, engine, 1)


def test_frozen_parameters_come_back_bit_for_bit(probes: Probes) -> None:
    for rank in probes.of["continue frozen"]:
        rank.assert_same_bits()


def accumulate(stage: int, bf16: bool) -> tuple[list[Any], ...]:
    """Norms and results of several backwards a step, and of one."""
    one, many = make(stage, bf16), make(stage, bf16)
    norms: tuple[list[Any], list[Any]] = [], []
    for step in (0, 1):
        backward(one, step)
        if bf16:  # 32 times a 32nd is exact in bfloat16, and so is its sum in float32 alone
            for i in range(32):
                backward(many, step, times=1 / 32, last=i == 31)
        else:
            for i in range(4):
                backward(many, step, rows=slice(i, i + 1), last=i == 3)
        for found, engine in zip(norms, (many, one), strict=True):
            found.append(engine.step(LR))
    return *norms, [held(many), held(one)]


def test_several_backwards_in_one_step_equal_one(probes: Probes) -> None:
    for many, one, ends in probes.of["accumulate"]:
        assert many == pytest.approx(one, rel=1e-6)
        assert_each(*ends, 2e-6)


class Refused(NamedTuple):
    """An engine before its bad steps, after each, and then beside one that never had any."""

    before: dict[str, Tensor]
    norms: list[float | None]
    after: list[dict[str, Tensor]]
    counts: list[int]
    goes_on: Pair


def refuse(stage: int, bf16: bool) -> Refused:
    """Good, bad, bad, good, and good, good; only rank 1 sees what is not finite."""
    bad, clean = make(stage, bf16), make(stage, bf16)
    good_step(bad, 0), good_step(clean, 0)
    found = Refused(held(bad), [], [], [], None)
    for value, windows in ((float("inf"), 1), (float("nan"), 2)):
        backward(bad, 1, times=value if bad.mesh.rank == 1 else 1.0, last=windows == 1)
        if windows == 2:
            backward(bad, 2)
        found.norms.append(bad.step(LR))
        found.after.append(held(bad))
        found.counts.append(bad.optimizer_step_count())
    return found._replace(goes_on=go_on(bad, clean, 3))


def test_a_gradient_that_is_not_finite_leaves_no_trace(probes: Probes) -> None:
    for rank in probes.of["refuse"]:
        assert rank.norms == [None, None]
        assert rank.counts == [1, 1]
        for after in rank.after:
            assert_each(after, rank.before, 0.0)
        rank.goes_on.assert_same_bits()
        moved = rank.goes_on.later[0]
        assert all(relative(moved[name], rank.before[name]) > 0 for name in moved)


def scaled_moves(stage: int, bf16: bool) -> tuple[list[dict[str, Tensor]], set[float]]:
    """The first step's moves with a group's lr_scale of 1 and of 4; later, all groups' rates."""
    engines, moves = [make(stage, bf16, scale=scale) for scale in (1.0, 4.0)], []
    for engine in engines:
        before = {f.name: f.values["master"].clone() for f in engine.fragments()}
        good_step(engine, 0)
        moves.append({f.name: f.values["master"] - before[f.name] for f in engine.fragments()})
    for engine in engines:
        good_step(engine, 1)
    groups = engines[1].base.param_groups
    return moves, {group["lr"] / group.get("lr_scale", 1.0) for group in groups}


def test_a_groups_scale_multiplies_its_rate_at_every_step(probes: Probes) -> None:
    """And nobody else's."""
    seen = 0
    for (one, many), rates in probes.of["scaled moves"]:
        if "second.bias" in one:  # of this rank's share
            # of values of about 1 (float32), which moved by 0.01
            assert relative(many.pop("second.bias"), 4 * one.pop("second.bias")) < 1e-4
            seen += 1
        assert_each(many, one, 0.0)
        assert rates == {2 * LR}
    assert seen


def forget_gradients(stage: int, bf16: bool) -> list[float | None]:
    engine, norms = make(stage, bf16), []
    for _ in range(2):
        backward(engine, 0)
        norms.append(engine.step(0.0))
    return norms


def test_a_step_begins_without_gradients_of_the_last(probes: Probes) -> None:
    for first, second in probes.of["forget gradients"]:
        assert second == first


def norm_of_step(stage: int, bf16: bool) -> float:
    return good_step(make(stage, bf16), 0)


def test_the_norm_is_of_the_sum_over_ranks_before_clipping(probes: Probes) -> None:
    model = Net(0)
    for rank in range(RANKS):
        generator = torch.Generator().manual_seed(rank)
        x, y = torch.randn(4, 13, generator=generator), torch.randn(4, 3, generator=generator)
        (model(x) - y).square().sum().backward()
    expected = torch.cat([p.grad.ravel() for p in model.parameters()]).norm().item()
    assert expected > 10 * 0.5  # the clip
    tolerance = 2**-6 if probes.bf16 else 1e-6
    assert probes.of["norm of step"] == [pytest.approx(expected, rel=tolerance)] * 2


PROBES: dict[str, Callable[[int, bool], Any]] = {
    "shares": shares,
    "share of state": share_of_state,
    "continue fresh": partial(continue_restored, used=False),
    "continue used": partial(continue_restored, used=True),
    "frozen shares": frozen_shares,
    "continue frozen": continue_frozen,
    "accumulate": accumulate,
    "refuse": refuse,
    "scaled moves": scaled_moves,
    "forget gradients": forget_gradients,
    "norm of step": norm_of_step,
}


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
