"""The real model on fake tensors, as one rank of a large world: what is held, what is sent.

torch's fake process group answers for all other ranks, so a world of thousands takes one process.
DeepSpeed does not run on fake tensors: gradients are let go as soon as they are made, and what
ZeRO holds is counted by its rule (train.planning.zero_rule).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.decoder import Decoder
from model.memory.base import detach
from parallel.mesh import Mesh, build_mesh, place
from parallel.slicing import layout_of
from parallel.tensor import sum_scattered_gradients
from train.build import make_model, to_model_config
from train.planning.memory import gib
from train.planning.shapes import Shapes, shapes_of
from train.planning.states import retrieving
from train.planning.tracing import Held, Message, Trace
from train.settings.config import Config


class DryRun(NamedTuple):
    """What one forward and backward pass of a rank holds and sends."""

    rank: int
    place: tuple[int, int, int]  # tp_rank, cp_rank, dp_rank
    parameters: int  # elements, of this rank's tensor-parallel part
    weights: int  # bytes of them
    kept: Held  # between forward and backward, weights not counted
    peak: Held  # the most at any moment, weights not counted
    messages: Counter[Message]
    operations: int  # of tensors, without views

    def describe(self) -> list[str]:
        """Return the pass in lines."""
        tp_rank, cp_rank, _ = self.place
        peak = ", ".join(f"{name} {gib(size)}" for name, size in sorted(self.peak.parts.items()))
        lines = [
            f"rank {self.rank} (TP {tp_rank}, CP {cp_rank}): {self.parameters:,} weights; beside"
            f" them at most {gib(self.peak.total)}: {peak}"
        ]
        for message, count in sorted(self.messages.items()):
            operation = message.operation.strip("_")
            lines.append(
                f"  {count:>6} x {operation} of {gib(message.num_bytes)}"
                f" ({message.num_bytes:,} bytes) over {message.ranks} {message.group} ranks"
            )
        return lines


def dry_run(
    config: Config, world: int, vocab_size: int, ranks: Sequence[int] | None = None
) -> list[DryRun]:
    """Return the passes of some ranks of a world; None: those that differ most.

    The configuration must fit the world. No process group may be there, and none is afterwards.
    Raises ValueError where what is computed hangs on values.
    """
    for memory in retrieving(to_model_config(config, vocab_size).memory):
        raise ValueError(
            f"model.memory.retrieve={memory.retrieve}: which blocks are read hangs on keys, and a"
            " dry run has none; model.memory.retrieve=0 counts all but the reads"
        )
    shapes = shapes_of(config, world)
    if ranks is None:
        ranks = distinct_ranks(shapes)
    return [_pass(config, shapes, vocab_size, rank) for rank in ranks]


def distinct_ranks(shapes: Shapes) -> list[int]:
    """Return the first and the last rank of TP and CP: data-parallel ranks are all alike."""
    tp, cp = shapes.tp, shapes.cp
    return sorted({0, cp * tp - 1})


def _pass(config: Config, shapes: Shapes, vocab_size: int, rank: int) -> DryRun:
    with _as_rank(rank, shapes.world):
        mesh = build_mesh(tp=shapes.tp, cp=shapes.cp)
        groups = {"tp": mesh.tp_group, "cp": mesh.cp_group}
        trace = Trace({group.group_name: axis for axis, group in groups.items()})
        with FakeTensorMode():
            model = _fake_model(config, mesh, vocab_size, shapes)
            parameters = list(model.parameters())
            batch = _fake_batch(shapes)
            with trace:
                trace.belongs(parameters, "weights")
                trace.belongs(batch.values(), "input")
                trace.label_modules(model, _part_of)
                output = model(**batch)
                with trace.part("state"):
                    state = detach(output.state)
                loss = output.loss
                del output  # as train.loop does
                kept = _without_weights(trace.now())
                with trace.part("backward"):
                    loss.backward()
                del state
                peak = _without_weights(trace.peak)
    return DryRun(
        rank,
        place(rank, tp=shapes.tp, cp=shapes.cp),
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        kept,
        peak,
        trace.messages,
        trace.operations,
    )


@contextlib.contextmanager
def _as_rank(rank: int, world: int) -> Iterator[None]:
    """Be one rank of a process group whose other ranks do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from parallel.megatron import parallel_state

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _fake_model(config: Config, mesh: Mesh, vocab_size: int, shapes: Shapes) -> Decoder:
    """Return the model in the type it computes with, its gradients let go as they are made."""
    layout = layout_of(config.parallel.layout, mesh.cp)
    model = make_model(config, to_model_config(config, vocab_size), mesh, layout)
    if shapes.element == 2:
        _to_bfloat16(model)
    if mesh.tp > 1 and config.parallel.sequence_parallel:
        sum_scattered_gradients(model, mesh)

    def let_go(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(let_go)
    return model


def _to_bfloat16(model: nn.Module) -> None:
    """As Module.bfloat16, which cannot swap the data of fake parameters."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            narrow = nn.Parameter(parameter.to(torch.bfloat16), parameter.requires_grad)
            narrow.__dict__.update(parameter.__dict__)
            setattr(module, name, narrow)


def _fake_batch(shapes: Shapes) -> dict[str, Tensor]:
    """Return the arguments of one forward pass, whole segments of one document."""
    shape = (shapes.batch, shapes.segments, shapes.length)
    tokens = torch.zeros(shape, dtype=torch.int64)
    starts = torch.zeros(shape[:2], dtype=torch.bool)
    batch = {"tokens": tokens, "labels": tokens.clone(), "starts": starts}
    batch["scale"] = torch.ones(())
    return batch


def _part_of(name: str) -> str | None:
    """Return what the modules of a decoder belong to, by their names."""
    words = name.split(".")
    if words[0] == "blocks" and len(words) in (2, 3):
        kinds = {"ffn": "ffn", "mixer": "attention", "qkv": "attention"}
        return kinds.get(words[-1], "residual")
    return {"embedding": "residual", "head": "head"}.get(name)


def _without_weights(held: Held) -> Held:
    return Held({part: size for part, size in held.parts.items() if part != "weights"})
