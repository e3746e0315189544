"""The same three steps on the ranks of a layout, by what training itself runs: build, the loop."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from data.streams import Batch
from model.config import ModelConfig
from parallel.engine import Engine
from parallel.mesh import Mesh, build_mesh
from parallel.tensor import Cut, cut_of
from parallel.whole import WholeEngine
from train.agree import of_all
from train.build import Built, build
from train.checking.batches import make_batches, take_lanes
from train.checking.plain import Step, Trained, enliven
from train.checking.probe import Probe, probe
from train.checking.ranks import RankFailure, run_ranks
from train.checking.shrink import Subject
from train.loop import TrainState, train_steps

CUT_ABOVE = 100
"""Elements: stage 3 cuts all matrices of the small model, as it does a large one's."""


class _Share(NamedTuple):
    """What one rank has."""

    tp_rank: int
    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    cuts: dict[str, Cut]
    probe: Probe | None


def train(subject: Subject, model_config: ModelConfig) -> tuple[Trained, Probe | None]:
    """Return what plain.train does, of a layout's ranks, and what the exchange of keys showed.

    A tensor that several tensor-parallel ranks hold has them as its first dimension: [ranks, ...].
    Raises RankFailure where one raises, or ranks differ in what they must share.
    """
    ranks: list[_Share] = run_ranks(subject.ranks, _train_on_a_rank, subject, model_config)
    tp = subject.config.parallel.tp
    parts = [next(rank for rank in ranks if rank.tp_rank == i) for i in range(tp)]
    for rank in ranks:
        if (rank.losses, rank.norms) != (ranks[0].losses, ranks[0].norms):
            raise RankFailure(
                f"ranks differ in loss or norm: {rank.losses}, {rank.norms} on one,"
                f" {ranks[0].losses}, {ranks[0].norms} on the first"
            )
        same = parts[rank.tp_rank].weights
        unequal = [name for name, w in rank.weights.items() if not torch.equal(w, same[name])]
        if unequal:
            raise RankFailure(f"ranks differ in the weights of {', '.join(unequal)}")
    cuts = ranks[0].cuts

    def join(shares: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            name: torch.stack([share[name] for share in shares])
            if cuts[name].dim is None
            else cuts[name].join([share[name] for share in shares]).unsqueeze(0)
            for name in shares[0]
        }

    steps = [
        Step(loss, norm, join([part.gradients[i] for part in parts]))
        for i, (loss, norm) in enumerate(zip(ranks[0].losses, ranks[0].norms, strict=True))
    ]
    probes = [rank.probe for rank in ranks if rank.probe is not None]
    worst = max(probes, key=lambda found: found.error, default=None)
    return Trained(steps, join([part.weights for part in parts])), worst


def _train_on_a_rank(subject: Subject, model_config: ModelConfig) -> _Share:
    config = subject.config
    mesh = build_mesh(tp=config.parallel.tp, cp=config.parallel.cp)

    def fill(model: nn.Module) -> None:
        enliven(
            model,
            model_config,
            config.seed,
            shape=lambda parameter: cut_of(parameter).whole_shape(parameter.shape, mesh.tp),
            take=lambda parameter, whole: cut_of(parameter).take(whole, mesh.tp, mesh.tp_rank),
        )

    built = build(config, model_config, mesh, fill, cut_above=CUT_ABOVE)
    cuts = {name: cut_of(p) for name, p in built.model.named_parameters()}
    recorder = _Recorder(built, mesh)
    recording = built._replace(engine=cast(Engine, recorder))
    batches = [_own(batch, subject, mesh) for batch in make_batches(config)]
    results = list(train_steps(config, recording, mesh, TrainState(), batches))
    return _Share(
        mesh.tp_rank,
        [result.loss for result in results],
        [result.grad_norm or float("nan") for result in results],
        recorder.gradients,
        recorder.weights(),
        cuts,
        probe(built.model.sequence, config.train.precision),
    )


def _own(batch: Batch, subject: Subject, mesh: Mesh) -> list[Batch]:
    """Return this rank's micro-batches of a step, lanes dealt out as the loader does."""
    lanes = torch.arange(len(batch.tokens)).chunk(subject.dp)[mesh.dp_rank]
    return [take_lanes(batch, rows) for rows in lanes.split(subject.config.train.micro_batch)]


class _Recorder:
    """An engine that keeps the gradients of every step, whole over its ranks, before it steps."""

    def __init__(self, built: Built, mesh: Mesh) -> None:
        self.engine, self.mesh = built.engine, mesh
        self.parameters = dict(built.model.named_parameters())
        self.gradients: list[dict[str, Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.backward(loss, last=last)

    def step(self, lr: float) -> float | None:
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        # Every rank asks in the same order: under ZeRO each answer is put together from all.
        self.gradients.append({name: self._gradient(name, p) for name, p in trained.items()})
        return self.engine.step(lr)

    def _gradient(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Return a whole gradient, float32; 0 where the step has none."""
        from deepspeed.utils import safe_get_full_grad

        if isinstance(self.engine, WholeEngine):
            master = self.engine.masters[name]
            return torch.zeros_like(master) if master.grad is None else master.grad.clone()
        found: Tensor = safe_get_full_grad(parameter).clone()
        return found

    def weights(self) -> dict[str, Tensor]:
        """Return masters, and weights that are frozen, joined from the ranks' shares."""
        mine = [(f.name, f.start, f.values["master"].clone()) for f in self.engine.fragments()]
        ranks = of_all(mine, self.mesh.zero_group)
        shares: dict[str, dict[int, Tensor]] = {name: {} for name in self.parameters}
        for name, start, share in (fragment for rank in ranks for fragment in rank):
            shares[name][start] = share
        return {
            name: torch.cat([parts[start] for start in sorted(parts)]).view(self._shape(name))
            for name, parts in shares.items()
        }

    def _shape(self, name: str) -> torch.Size:
        """Return a parameter's shape, which stage 3 keeps beside it."""
        parameter: Any = self.parameters[name]
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        return shape
