"""The same three steps on the ranks of one layout."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.attention import Layout, Whole
from model.decoder import Decoder
from model.init import initialise
from model.local import FoldedSequence, LocalLinears
from model.loss import IGNORE
from model.memory.base import detach
from parallel import zero
from parallel.mesh import Mesh, build_mesh
from parallel.ring import choose_exchange
from parallel.slicing import choose_layout, take_slice
from parallel.tensor import MegatronLinears, cut_of, sum_scattered_gradients
from tests.parallel.plain import (
    BATCH,
    CLIP,
    LEARNING_RATES,
    SEGMENTS,
    Case,
    Step,
    batches_of,
    biases_start_at_one,
    config_of,
    make_optimizer,
    trained,
    unmark_adapters,
)
from tests.ranks import run_ranks


def run(case: Case) -> tuple[list[Step], dict[str, Tensor]]:
    """Return what plain.train does, with whole gradients and weights, from a layout's ranks."""
    ranks = run_ranks(case.ranks, train_on_a_rank, case)
    first_of_tp = {result["tp_rank"]: result for result in reversed(ranks)}
    cuts = ranks[0]["cuts"]

    def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: cuts[name].join([part[name] for part in parts]) for name in parts[0]}

    for result in ranks:
        assert [s[:2] for s in result["steps"]] == [s[:2] for s in ranks[0]["steps"]]
        same = first_of_tp[result["tp_rank"]]["weights"]
        assert all(torch.equal(w, same[name]) for name, w in result["weights"].items())
    parts = [first_of_tp[rank] for rank in range(case.tp)]
    steps = [
        Step(step.loss, step.grad_norm, join([part["steps"][i].gradients for part in parts]))
        for i, step in enumerate(ranks[0]["steps"])
    ]
    return steps, join([part["weights"] for part in parts])


def build(case: Case, mesh: Mesh) -> tuple[zero.ZeroEngine, Layout]:
    """Return the case's model under its engine."""
    config, layout = config_of(case), Whole()
    sequence, linears = FoldedSequence(), LocalLinears()
    if case.cp > 1:
        layout = choose_layout(case.layout, case.cp)
        sequence = FoldedSequence(layout, choose_exchange(case.exchange, mesh.cp_group))
    if case.tp > 1:
        sp = case.tensor == "TP2+SP"
        linears = MegatronLinears(mesh, sequence_parallel=sp, dtype=torch.float32)
    model = Decoder(config, sequence=sequence, linears=linears, compute=case.compute)
    biases_start_at_one(model)
    unmark_adapters(model)
    initialise(
        model,
        config,
        seed=0,
        shape=lambda p: cut_of(p).whole_shape(p.shape, mesh.tp),
        take=lambda p, whole: cut_of(p).take(whole, mesh.tp, mesh.tp_rank),
    )
    if case.tensor == "TP2+SP":
        sum_scattered_gradients(model, mesh)
    keep_matrices_partitioned()
    engine = zero.ZeroEngine(
        model, make_optimizer(model), mesh, stage=case.stage, bf16=case.bf16, clip=CLIP
    )
    return engine, layout


def keep_matrices_partitioned() -> None:
    """Have stage 3 cut all matrices of a small model, as it does a large one's.

    By default it keeps parameters under 1e5 elements whole on every rank.
    """
    made = zero._config

    def config(*args: Any, **kwargs: Any) -> dict[str, Any]:
        changed = made(*args, **kwargs)
        changed["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        return changed

    zero._config = config


def whole_frozen(engine: zero.ZeroEngine) -> dict[str, Tensor]:
    """Return this TP rank's part of every frozen parameter, joined from the shares."""
    mine = [(f.name, f.values["master"].clone()) for f in engine.frozen_fragments()]
    ranks: list[Any] = [None] * engine.mesh.zero_size
    dist.all_gather_object(ranks, mine, group=engine.mesh.zero_group)
    found: dict[str, list[Tensor]] = {}
    for name, share in (pair for rank in ranks for pair in rank):
        found.setdefault(name, []).append(share)
    return {
        name: torch.cat(found[name]).view(getattr(p, "ds_shape", p.shape))
        for name, p in engine.frozen.items()
    }


def train_on_a_rank(case: Case) -> dict[str, Any]:
    """Run three steps; return them, the weights and how parameters are cut."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    mesh = build_mesh(tp=case.tp, cp=case.cp)
    engine, layout = build(case, mesh)
    model = engine.engine.module
    own = torch.arange(BATCH).chunk(mesh.dp)[mesh.dp_rank].chunk(case.micro_batches)
    states: list[Any] = [None] * case.micro_batches
    steps = []
    given, documents = batches_of(case)
    for (tokens, starts, labels), lr in zip(given, LEARNING_RATES, strict=True):
        scale = torch.tensor(1.0 / int((labels != IGNORE).sum()))
        total = torch.zeros(())
        if case.cp > 1:
            tokens, labels = (take_slice(x, layout, mesh.cp_rank) for x in (tokens, labels))
        windows = torch.arange(SEGMENTS).chunk(case.windows)
        for i, rows in enumerate(own):
            for j, window in enumerate(windows):
                here = (rows[:, None], window)
                output = engine(
                    tokens[here],
                    starts[here],
                    states[i],
                    labels=labels[here],
                    scale=scale,
                    step=0,
                    documents=None if documents is None else documents[here],
                )
                last = i == len(own) - 1 and j == len(windows) - 1
                engine.backward(output.loss, last=last)
                states[i] = detach(output.state)
                total += output.loss.detach()
        dist.all_reduce(total, group=mesh.zero_group)
        gradients = {name: safe_get_full_grad(p).clone() for name, p in trained(model).items()}
        norm = engine.step(lr)
        assert norm is not None
        steps.append(Step(total.item(), norm, gradients))
    weights = {n: safe_get_full_fp32_param(p).clone() for n, p in trained(model).items()}
    weights |= whole_frozen(engine)
    cuts = {name: cut_of(p) for name, p in model.named_parameters()}
    return {"tp_rank": mesh.tp_rank, "steps": steps, "weights": weights, "cuts": cuts}
