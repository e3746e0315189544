"""Bugs that others have shipped, planted: what `longhaul check` must find and name.

Each is planted in this process; ranks and the plain process are forks of it. What the plain process
shares (the model) is planted where only ranks use it, but for the detach, which is in both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import train.build
import train.loop
from model.local import FoldedSequence
from model.memory.base import detach, map_tensors
from model.memory.fam import FamPart
from parallel.mesh import Mesh
from parallel.ring import Ring
from parallel.slicing import take_slice
from parallel.zero import ZeroEngine
from train.build import Built
from train.checking.check import Report, check
from train.settings.config import Config, validate

Plant = Callable[[pytest.MonkeyPatch], None]


class Mutation(NamedTuple):
    """One planted bug, where it is planted, and how it is named."""

    about: str
    plant: Plant
    changes: dict[str, object]  # of the configuration, dotted
    kinds: set[str]  # of what is off, some of which must be
    switches: set[str]
    parameter: str = ""  # part of the name of one that is off


def config_of(changes: dict[str, object]) -> Config:
    """Return a configuration with few switches on: each more is a run more in the search."""
    raw: dict[str, Any] = {
        "name": "mutated",
        "model": {
            "vocab_size": 128, "num_layers": 2, "hidden_size": 64, "num_heads": 4,
            "num_kv_heads": 4, "ffn_size": 128, "memory": {"name": "none"},
        },
        "data": {"train": "nowhere", "segment_len": 64, "sample_len": 64},
        "parallel": {},
        "train": {"steps": 10, "batch_size": 1, "lr": 1e-3},
    }  # fmt: skip
    for key, value in changes.items():
        section, name = key.split(".")
        raw[section][name] = value
    return validate(raw)


def find(mutation: Mutation) -> Report:
    """Return what the check says of a planted bug, on two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        mutation.plant(patch)
        return check(config_of(mutation.changes), 2, lambda line: None)


def loss_scaled_by_cp(patch: pytest.MonkeyPatch) -> None:
    backward = ZeroEngine.backward

    def scaled(self: ZeroEngine, loss: Tensor, *, last: bool) -> None:
        backward(self, loss * self.mesh.cp, last=last)

    patch.setattr(ZeroEngine, "backward", scaled)


def labels_shifted_after_slicing(patch: pytest.MonkeyPatch) -> None:
    window = train.loop.window

    def shifted(batch: Any, first: int, count: int, built: Built, mesh: Mesh) -> Any:
        tokens, _, *rest = window(batch, first, count, built, mesh)
        ids = batch.labels[:, first : first + count].roll(1, 2)
        return (tokens, take_slice(ids, built.layout, mesh.cp_rank).roll(-1, 2), *rest)

    patch.setattr(train.loop, "window", shifted)


def dk_and_dv_swapped(patch: pytest.MonkeyPatch) -> None:
    visit_back = Ring.visit_back

    def swapped(self: Ring, *args: Any) -> tuple[Tensor, Tensor]:
        dk, dv = visit_back(self, *args)
        return dv, dk

    patch.setattr(Ring, "visit_back", swapped)


def gradients_not_sent_home(patch: pytest.MonkeyPatch) -> None:
    """They stop one hop before."""
    visit_back = Ring.visit_back

    def lost(self: Ring, *args: Any) -> tuple[Tensor, Tensor]:
        elsewhere = self.pass_on(torch.stack(visit_back(self, *args))).wait()
        return elsewhere[0], elsewhere[1]

    patch.setattr(Ring, "visit_back", lost)


def only_own_gradients(patch: pytest.MonkeyPatch) -> None:
    """A rank's keys learn nothing of other ranks' queries."""

    def own(self: Ring, k: Tensor, v: Tensor, step: Any) -> tuple[Tensor, Tensor]:
        kept: list[tuple[Tensor, Tensor]] = []
        self.visit(k, v, lambda *args: kept.append(step(*args, slice(None))))
        return kept[0]

    patch.setattr(Ring, "visit_back", own)


def no_sum_of_norms(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(train.build, "sum_scattered_gradients", lambda model, mesh: None)


def ring_adds_in(dtype: torch.dtype | None, patch: pytest.MonkeyPatch) -> None:
    """dtype: of the sums; None: that of the keys."""

    def visit_back(self: Ring, k: Tensor, v: Tensor, step: Any) -> tuple[Tensor, Tensor]:
        held, grads = torch.stack((k, v)), torch.zeros((), dtype=dtype or k.dtype)
        for t in range(self.size):
            dk, dv = step((self.rank - t) % self.size, *held, slice(None))
            grads = self.pass_on(grads + torch.stack((dk, dv)).to(grads.dtype)).wait()
            held = self.pass_on(held).wait()
        return grads[0], grads[1]

    patch.setattr(Ring, "visit_back", visit_back)


def rope_not_permuted(patch: pytest.MonkeyPatch) -> None:
    def positions(self: FoldedSequence, segment_len: int) -> Tensor:
        length = segment_len // self.size
        return torch.arange(self.rank * length, (self.rank + 1) * length)

    patch.setattr(FoldedSequence, "positions", positions)


def memory_not_summed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FoldedSequence, "total", lambda self, x: x)


def detached(only_on_ranks: bool, patch: pytest.MonkeyPatch) -> None:
    close = FamPart._close

    def cut(self: FamPart, *args: Any) -> Any:
        slots = close(self, *args)
        if only_on_ranks and not dist.is_initialized():
            return slots
        return slots._replace(rows=slots.rows.detach())

    patch.setattr(FamPart, "_close", cut)


def memory_not_carried(patch: pytest.MonkeyPatch) -> None:
    def forgotten(state: Any) -> Any:
        return map_tensors(torch.zeros_like, detach(state))

    patch.setattr(train.loop, "detach", forgotten)


CP = {"parallel.cp": 2}
SEVERAL = {"data.sample_len": 256}
ZIGZAG, RING = "parallel.layout=zigzag", "parallel.attention=ring"
FAM = {"model.memory": {"name": "fam"}}
INFINI = {"model.memory": {"name": "infini"}}

MUTATIONS = {
    "loss-scaled-by-cp": Mutation(
        "loss scaled by CP", loss_scaled_by_cp, CP, {"gradient"}, {"parallel.cp=2"}
    ),
    "labels-shifted": Mutation(
        "labels shifted after slicing",
        labels_shifted_after_slicing,
        CP,
        {"loss"},
        {"parallel.cp=2"},
    ),
    "dk-dv-swapped": Mutation(
        "dK and dV swapped in the ring",
        dk_and_dv_swapped,
        CP,
        {"gradient", "exchange"},
        {"parallel.cp=2", RING},
        "(k)",
    ),
    "not-sent-home": Mutation(
        "dK and dV stop one hop before home",
        gradients_not_sent_home,
        CP,
        {"gradient", "exchange"},
        {"parallel.cp=2", RING},
        "(v)",
    ),
    "only-own": Mutation(
        "dK and dV of other ranks' queries dropped",
        only_own_gradients,
        CP,
        {"gradient", "exchange"},
        {"parallel.cp=2", RING},
        "(k)",
    ),
    "norms-not-summed": Mutation(
        "no all-reduce of norm gradients under sequence parallelism",
        no_sum_of_norms,
        {"parallel.tp": 2},
        {"gradient"},
        {"parallel.tp=2", "parallel.sequence_parallel=true"},
        "norm.weight",
    ),
    "bf16-ring": Mutation(
        "dK and dV added in bfloat16 over the ring",
        functools.partial(ring_adds_in, torch.bfloat16),
        CP,
        {"gradient", "exchange"},
        {"parallel.cp=2", RING},
    ),
    "bf16-ring-of-bf16": Mutation(
        "the same where keys are bfloat16, in a bf16 run",
        functools.partial(ring_adds_in, None),
        CP | {"train.precision": "bf16"},
        {"exchange"},
        {"parallel.cp=2", RING, "train.precision=bf16"},
    ),
    "rope-not-permuted": Mutation(
        "RoPE positions not permuted under zigzag",
        rope_not_permuted,
        CP,
        {"loss"},
        {"parallel.cp=2", ZIGZAG},
    ),
    "memory-not-summed": Mutation(
        "infini's matrices not summed over CP",
        memory_not_summed,
        CP | SEVERAL | INFINI,
        {"loss"},
        {"parallel.cp=2", "model.memory=infini"},
    ),
    "detached-on-ranks": Mutation(
        "a detach in fam's recurrence, on the ranks",
        functools.partial(detached, True),
        SEVERAL | FAM,
        {"gradient"},
        {"model.memory=fam", "data.sample_len (several segments)"},
        "memory.parts.fam.prompt",
    ),
    "detached": Mutation(
        "a detach in fam's recurrence, in the model itself",
        functools.partial(detached, False),
        SEVERAL | FAM,
        {"slope"},
        {"model.memory=fam", "data.sample_len (several segments)"},
        "memory.parts.fam.prompt",
    ),
    "not-carried": Mutation(
        "memory lost from step to step", memory_not_carried, FAM, {"loss"}, {"model.memory=fam"}
    ),
}
