"""The same three steps on the ranks of a layout, by what training itself runs: build, the loop."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.streams import Batch
from model.config import ModelConfig
from parallel.mesh import Mesh, build_mesh
from parallel.tensor import Cut, cut_of
from parallel.zero import ZeroEngine
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
    recorder = _Recorder(built)
    recording = built._replace(engine=cast(ZeroEngine, recorder))
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

    def __init__(self, built: Built) -> None:
        self.engine = built.engine
        parameters = built.model.named_parameters()
        self.trained = {name: p for name, p in parameters if p.requires_grad}
        self.gradients: list[dict[str, Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.backward(loss, last=last)

    def step(self, lr: float) -> float | None:
        from deepspeed.utils import safe_get_full_grad

        # The whole of a parameter in each rank's hands: every rank asks in the same order.
        found = {name: safe_get_full_grad(p).clone() for name, p in self.trained.items()}
        self.gradients.append(found)
        return self.engine.step(lr)

    def weights(self) -> dict[str, Tensor]:
        """Return masters, and weights that are frozen, this tensor-parallel rank's part."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {name: safe_get_full_fp32_param(p).clone() for name, p in self.trained.items()}
        return found | self._frozen()

    def _frozen(self) -> dict[str, Tensor]:
        """Return what is frozen, joined from the ranks' shares."""
        mesh = self.engine.mesh
        mine = [(f.name, f.values["master"].clone()) for f in self.engine.frozen_fragments()]
        ranks: list[Any] = [None] * mesh.zero_size
        dist.all_gather_object(ranks, mine, group=mesh.zero_group)
        shares: dict[str, list[Tensor]] = {}
        for name, share in (pair for rank in ranks for pair in rank):
            shares.setdefault(name, []).append(share)
        return {
            name: torch.cat(shares[name]).view(getattr(p, "ds_shape", p.shape))
            for name, p in self.engine.frozen.items()
        }
