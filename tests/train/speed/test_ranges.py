"""Ranges for Nsight Systems, told here to a list."""

from __future__ import annotations

from itertools import count
from typing import cast

import pytest
import torch
from torch import Tensor

from model.attention import Alone, Visit, VisitBack
from model.config import FamMemory, MemoryConfig, RmtMemory
from model.local import FoldedSequence
from parallel.engine import Engine
from tests.model.small import batch_of, build, config_of, gradients
from train.speed.ranges import NvtxRanges, name_parts
from train.watch.pulse import Pulse


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is told: +name where a range begins, - where it ends (a process's: -handle)."""
    handles, found = count(), []

    def start(name: str) -> int:
        found.append(f"+{name}")
        return next(handles)

    monkeypatch.setattr(torch.cuda.nvtx, "range_start", start)
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", lambda handle: found.append(f"-{handle}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: found.append(f"+{name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: found.append("-"))
    return found


def test_ranges_lie_in_one_another_and_end_before_the_next_begins(told: list[str]) -> None:
    pulse = Pulse()
    pulse.mark = NvtxRanges().begin
    pulse.enter("step", 7)
    pulse.window(0, 0, 3)
    pulse.layer(0, "forward")
    pulse.layer(0, "backward")
    pulse.enter("save", 7)
    assert told == [
        "+step 7",
        "+micro-batch 0, segments 0 to 3",
        "+forward of layer 0",
        "-2",
        "+backward of layer 0",
        "-3",
        "-1",
        "-0",
        "+save 7",
    ]


class Steps:
    """An engine that does nothing."""

    def step(self, lr: float) -> float | None:
        return lr


class Two(Alone):
    """An exchange that brings a rank's keys by twice, the second time as another's."""

    def visit(self, k: Tensor, v: Tensor, step: Visit) -> None:
        step(1, k, v)
        step(0, k, v)

    def visit_back(self, k: Tensor, v: Tensor, step: VisitBack) -> tuple[Tensor, Tensor]:
        step(1, k, v)
        return step(0, k, v)


def trained(memory: MemoryConfig, *, named: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a small model, and its gradients; named: with ranges."""
    model, batch = build(config_of(memory)), batch_of(1, 2, 8)
    if named:
        name_parts(model, cast(Engine, Steps()), NvtxRanges())
    output = model(batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale)
    output.loss.backward()
    return output.loss.detach(), gradients(model)


@pytest.mark.parametrize(
    ("memory", "names"),
    [
        (FamMemory(slots=4, window=1), {"chain of fam", "fold of rows"}),
        (RmtMemory(), {"open the segment", "close the segment"}),
    ],
)
def test_parts_are_named_and_nothing_else_changes(
    memory: MemoryConfig, names: set[str], told: list[str]
) -> None:
    (loss, grads), (expected, expected_grads) = (
        trained(memory, named=True),
        trained(memory, named=False),
    )
    assert torch.equal(loss, expected)
    assert all(torch.equal(grads[name], grad) for name, grad in expected_grads.items())
    begun = [name for name in told if name != "-"]
    assert len(begun) == len(told) / 2
    assert {"+fold", "+visit", "+visit back", "+head and loss"} < set(begun)
    assert names <= {name.removeprefix("+") for name in begun}


def test_each_ranks_keys_are_a_range_of_the_visit(told: list[str]) -> None:
    sequence = FoldedSequence(exchange=Two())
    model = build(config_of(FamMemory(slots=4, window=1)))
    model.sequence = sequence
    engine = Steps()
    name_parts(model, cast(Engine, engine), NvtxRanges())
    sequence.exchange.visit(torch.ones(1), torch.ones(1), lambda source, k, v: told.append("read"))
    visit = ["+visit", "+keys of rank 1", "read", "-", "+keys of rank 0", "read", "-", "-"]
    assert told == visit
    assert engine.step(3.0) == 3.0
    assert told[len(visit) :] == ["+optimizer"]
