"""The engine that shares nothing against ZeRO on the same rank, and under tensor parallelism."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.decoder import Decoder
from model.init import initialise
from parallel.engine import Engine, make_engine
from parallel.mesh import Mesh, build_mesh
from parallel.tensor import MegatronLinears, cut_of, sum_scattered_gradients
from parallel.whole import WholeEngine
from parallel.zero import ZeroEngine
from tests.compare import assert_each
from tests.parallel.cases import Case, config_of, subject_of
from tests.parallel.test_zero import FROZEN, LR, Net
from tests.ranks import run_ranks
from train.checking.batches import make_batches

pytestmark = pytest.mark.gloo

PRECISION = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
CLIP = 0.5


def make(kind: type[Any], bf16: bool, seed: int = 0, frozen: tuple[str, ...] = ()) -> Any:
    model = Net(seed)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0, "lr_scale": 3.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=1.0, betas=(0.9, 0.95), fused=True
    )
    settings: dict[str, Any] = {"bf16": bf16, "clip": CLIP}
    if kind is ZeroEngine:
        settings["stage"] = 1
    return kind(model, optimizer, build_mesh(tp=1, cp=1), **settings)


def backward(engine: Engine, step: int, part: slice = slice(None), **kwargs: Any) -> None:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(4, 13, generator=generator), torch.randn(4, 3, generator=generator)
    dtype = next(f for f in weights_of(engine).values()).dtype
    times = kwargs.pop("times", 1.0)
    loss = (engine(x[part].to(dtype)).float() - y[part]).square().sum() * times
    engine.backward(loss, last=kwargs.get("last", True))


def weights_of(engine: Any) -> dict[str, Tensor]:
    module = engine.model if isinstance(engine, WholeEngine) else engine.engine.module
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def held(engine: Engine) -> dict[str, Tensor]:
    return {
        f"{f.name} {kind}": value.clone()
        for f in engine.fragments()
        for kind, value in f.values.items()
    } | weights_of(engine)


def same_as_zero(bf16: bool, frozen: tuple[str, ...]) -> None:
    engines = [make(kind, bf16, frozen=frozen) for kind in (WholeEngine, ZeroEngine)]
    for step in range(4):  # of several windows, and one that is not finite
        norms = []
        for engine in engines:
            for i in range(2):
                times = float("nan") if step == 2 and i == 0 else 1.0
                backward(engine, step, slice(2 * i, 2 * i + 2), last=i == 1, times=times)
            norms.append(engine.step(LR * (1 + step)))
        assert (norms[0] is None) == (norms[1] is None) == (step == 2)
        if norms[1] is not None:
            assert norms[0] == pytest.approx(norms[1], rel=1e-6)
            assert norms[0] > CLIP  # clipping is tried
    whole, zero = map(held, engines)
    assert_each(whole, zero, 1e-6)
    assert engines[0].optimizer_step_count() == engines[1].optimizer_step_count() == 3


@PRECISION
@pytest.mark.parametrize("frozen", [(), FROZEN], ids=["all", "some"])
def test_it_does_what_zero_does(bf16: bool, frozen: tuple[str, ...]) -> None:
    run_ranks(1, same_as_zero, bf16, frozen)


def goes_on(bf16: bool) -> None:
    engine, fresh = make(WholeEngine, bf16), make(WholeEngine, bf16, seed=1)
    for step in (0, 1):
        backward(engine, step)
        engine.step(LR)
    saved = {f.name: {k: v.clone() for k, v in f.values.items()} for f in engine.fragments()}
    backward(fresh, 9)
    fresh.step(LR)
    for fragment in fresh.fragments():
        for kind, value in fragment.values.items():
            value.copy_(saved[fragment.name][kind])
    fresh.restore(engine.optimizer_step_count())
    assert_each(held(fresh), held(engine), 0.0)
    for each in (engine, fresh):
        backward(each, 2)
        each.step(LR)
    assert_each(held(fresh), held(engine), 0.0)


@PRECISION
def test_restored_it_goes_on_bit_for_bit(bf16: bool) -> None:
    run_ranks(1, goes_on, bf16)


def decoder(case: Case, mesh: Mesh) -> Decoder:
    config = config_of(case)
    linears = MegatronLinears(mesh, sequence_parallel=case.tensor == "TP2+SP", dtype=torch.float32)
    model = Decoder(config, linears=linears)
    initialise(
        model,
        config,
        seed=0,
        shape=lambda p: cut_of(p).whole_shape(p.shape, mesh.tp),
        take=lambda p, whole: cut_of(p).take(whole, mesh.tp, mesh.tp_rank),
    )
    if case.tensor == "TP2+SP":
        sum_scattered_gradients(model, mesh)
    return model


def on_a_tensor_parallel_rank(case: Case) -> None:
    mesh = build_mesh(tp=2, cp=1)
    models = [decoder(case, mesh) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
    settings: dict[str, Any] = {"stage": 1, "bf16": False, "clip": CLIP}
    whole = make_engine(models[0], optimizers[0], mesh, **settings)
    assert isinstance(whole, WholeEngine)
    zero = ZeroEngine(models[1], optimizers[1], mesh, **settings)
    for batch in make_batches(subject_of(case).config):
        norms = []
        for engine in (whole, zero):
            scale = torch.tensor(0.01)
            out = engine(batch.tokens, batch.starts, labels=batch.labels, scale=scale)
            engine.backward(out.loss, last=True)
            norms.append(engine.step(LR))
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert_each(held(whole), held(zero), 1e-5)


@pytest.mark.parametrize("tensor", ["TP2", "TP2+SP"])
def test_tensor_parallel_ranks_find_one_norm(tensor: Any) -> None:
    run_ranks(2, on_a_tensor_parallel_rank, Case(tensor=tensor, memory="fam"))


def refuses_together(value: float) -> list[float | None]:
    mesh = build_mesh(tp=2, cp=1)
    model = Net(0)  # each rank has all of it
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine = WholeEngine(model, optimizer, mesh, bf16=False, clip=CLIP)
    backward(engine, 0, times=value if mesh.rank == 1 else 1.0)
    return [engine.step(LR), engine.optimizer_step_count()]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_on_one_rank_is_refused_on_all(value: float) -> None:
    assert run_ranks(2, refuses_together, value) == [[None, 0.0], [None, 0.0]]
