"""The step, as the data flows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.streams import IGNORE, Batch
from model.memory.base import Carried, Initial, detach, map_tensors
from parallel.mesh import Mesh
from parallel.slicing import take_slice
from train.build import Built
from train.guard import Guard, Trouble
from train.reading.curriculum import cut_documents, segment_limit
from train.schedule import learning_rate
from train.settings.config import Config
from train.watch.pulse import Pulse


@dataclass
class TrainState:
    """Everything that changes as training goes on, beside weights and moments."""

    step: int = 0  # steps done; their samples are consumed
    skipped: int = 0  # of them, in a row until now, without an update
    updates: int = 0  # of them, with one
    rollbacks: int = 0  # each within checkpoint.every steps of the one before
    rolled_back: int = 0  # step of the last one
    memory: dict[int, Carried] = field(default_factory=dict)  # by micro-batch of this rank
    passed: list[Initial] | None = None  # what random state passing may begin a document with


class OtherDataError(ValueError):
    """Ranks that share a sequence read different data."""


class StepResult(NamedTuple):
    """What one step gave."""

    loss: float  # mean over all targets of the step, all ranks
    grad_norm: float | None  # before clipping; None: the step was skipped
    lr: float
    targets: int
    trouble: Trouble | None = None  # a spike may have a gradient norm: it was only told


def train_steps(
    config: Config,
    built: Built,
    mesh: Mesh,
    state: TrainState,
    batches: Iterable[list[Batch]],
    *,
    guard: Guard | None = None,
    pulse: Pulse | None = None,
) -> Iterator[StepResult]:
    """Do one optimizer step for each item of batches and yield its result.

    guard: keeps spikes from the weights. pulse: told where this rank is.
    """
    guard, pulse = guard or Guard(), pulse or Pulse()
    for step_batches in batches:
        pulse.enter("step", state.step + 1)
        limit = segment_limit(config, state.step)
        micro_batches = [
            batch._replace(starts=cut_documents(batch.starts, limit)) for batch in step_batches
        ]
        targets = count_targets(micro_batches, mesh)
        scale = torch.tensor(1.0 / max(1, targets), device=mesh.device)
        passed = state.passed if takes_passed_state(config, state.step) else None
        total = torch.zeros((), device=mesh.device)
        windows = [
            (index, batch, first)
            for index, batch in enumerate(micro_batches)
            for first in range(0, batch.tokens.shape[1], config.bptt_segments)
        ]
        for number, (index, batch, first) in enumerate(windows):
            pulse.window(index, first, first + config.bptt_segments - 1)
            tokens, labels, starts, documents = window(
                batch, first, config.bptt_segments, built, mesh
            )
            output = built.engine(
                tokens,
                starts,
                state.memory.get(index),
                labels=labels,
                scale=scale,
                passed=passed,
                step=state.step,
                documents=documents,
            )
            total += output.loss.detach()
            last = number == len(windows) - 1
            loss = poison(output.loss, total, mesh, guard.cut()) if last else output.loss
            state.memory[index] = detach(output.state)
            # Before the backward: parts of the graph that only the last state hangs on would hold
            # what checkpointing recomputes for them, in every layer, until the end.
            del output
            built.engine.backward(loss, last=last)
        lr = learning_rate(config.train, state.step)
        grad_norm = built.engine.step(lr)
        dist.all_reduce(total, group=mesh.zero_group)
        state.step += 1
        if grad_norm is None:
            # What this step left in it may not be finite, and what the one before left is of text
            # that the next does not follow: in some lanes another document's.
            state.memory = {}
            state.skipped += 1
        else:
            state.skipped = 0
            state.updates += 1
            hand_on(config, built, mesh, state)
        loss_value = total.item()
        trouble = guard.judge(loss_value, skipped=grad_norm is None, device=mesh.device)
        yield StepResult(loss_value, grad_norm, lr, targets, trouble)
        pulse.enter("data", state.step + 1)


def window(
    batch: Batch, first: int, count: int, built: Built, mesh: Mesh
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return this rank's part of one BPTT window.

    Tokens and labels [B, n, S / cp], starts [B, n]; documents [B, n, S] of all ranks, on the CPU,
    where segments are packed.
    """
    segments = slice(first, first + count)
    tokens, labels = (
        take_slice(x[:, segments], built.layout, mesh.cp_rank).to(mesh.device)
        for x in (batch.tokens, batch.labels)
    )
    documents = None if batch.documents is None else batch.documents[:, segments]
    return tokens, labels, batch.starts[:, segments].to(mesh.device), documents


def count_targets(batches: list[Batch], mesh: Mesh) -> int:
    """Return the number of target tokens of a step over all ranks.

    Raises OtherDataError on all ranks where those of one data-parallel place read different data.
    """
    mine = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    count = torch.tensor(mine, dtype=torch.int64, device=mesh.device)
    dist.all_reduce(count, group=mesh.dp_group)
    extremes = torch.stack((count, -count))
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    most, least = extremes.tolist()
    if most != -least:
        raise OtherDataError(
            f"ranks that share a sequence read different data: {most:,} target tokens in this step"
            f" on one, {-least:,} on another; a document is damaged, or missing, on one node and"
            " not on another: make data.train the same on every node and start again; nothing is"
            " lost"
        )
    return int(most)


def poison(loss: Tensor, total: Tensor, mesh: Mesh, cut: float = math.inf) -> Tensor:
    """Return loss, or nan on every rank where the step's is not finite, or above cut, on any.

    ZeRO skips a step whose gradient is not finite; this makes a bad loss one of those.
    """
    everywhere = total.clone()
    dist.all_reduce(everywhere, group=mesh.zero_group)
    good = everywhere.isfinite() & (everywhere <= cut)
    return loss * torch.where(good, 1.0, math.nan)


def takes_passed_state(config: Config, step: int) -> bool:
    """Return whether documents begin this step with passed state: a function of (seed, step)."""
    probability = config.model.memory.state_passing
    digest = hashlib.sha256(f"{config.seed}:passed:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < probability * 2**64


def hand_on(config: Config, built: Built, mesh: Mesh, state: TrainState) -> None:
    """Keep the first lane's state for random state passing, the same on all DP ranks."""
    if not config.model.memory.state_passing:
        return
    passed = built.model.memory.handed_on(state.memory[0])
    if passed is not None:
        source = dist.get_process_group_ranks(mesh.dp_group)[0]

        def spread(tensor: Tensor) -> Tensor:
            dist.broadcast(tensor, source, group=mesh.dp_group)
            return tensor

        state.passed = map_tensors(spread, passed)
