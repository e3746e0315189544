"""Every memory over context-parallel ranks in float64: the numbers of one process, not close ones.

test_equivalence has the whole stack in float32, where rounding hides what is small; here nothing
but the sequence is cut, and everything agrees to 1e-10.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.config import HmtMemory, LandmarkMemory, MemoryConfig
from model.decoder import Decoder
from model.init import initialise
from model.local import FoldedSequence
from model.memory.base import detach, named_tensors
from parallel.ring import choose_exchange
from parallel.slicing import choose_layout, take_slice
from tests.compare import assert_each
from tests.model.small import stir
from tests.parallel.cases import MEMORIES, Case, config_of, subject_of
from tests.ranks import run_ranks
from train.checking.batches import make_batches
from train.checking.plain import scale_of


def two_steps(name: str, sequence: FoldedSequence | None, layout: Any) -> dict[str, Tensor]:
    """Gradients and losses of two forward passes, memory carried between them; final state."""
    config = config_of(Case(memory=name))
    model = Decoder(config, sequence=sequence).double()
    initialise(model, config, seed=0)
    stir(model)
    found, state = {}, None
    for step, batch in enumerate(make_batches(subject_of(Case(memory=name)).config)[:2]):
        tokens, starts, labels = batch.tokens, batch.starts, batch.labels
        scale = scale_of(batch, torch.float64)
        if layout is not None:
            tokens, labels = (take_slice(x, layout, dist.get_rank()) for x in (tokens, labels))
        model.zero_grad()
        output = model(tokens, starts, state, labels=labels, scale=scale, step=0)
        output.loss.backward()
        state = detach(output.state)
        found[f"{step} loss"] = output.loss.detach()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[f"{step} {parameter_name}"] = parameter.grad.clone()
    if layout is not None:
        for x in found.values():
            dist.all_reduce(x)
    for path, x in named_tensors(state, "state").items():
        if "/window/" not in path:  # keys of the past lie where their tokens do
            found[path] = x
    return found


def on_a_rank(exchange: str, layout_name: str) -> dict[str, dict[str, Tensor]]:
    layout = choose_layout(layout_name, dist.get_world_size())
    sequence = FoldedSequence(layout, choose_exchange(exchange, dist.group.WORLD))
    return {name: two_steps(name, sequence, layout) for name in fitting(layout_name)}


def fitting(layout: str) -> list[str]:
    """Search needs the first half of a segment evenly on all ranks, retrieval all of it on one."""

    def fits(memory: MemoryConfig) -> bool:
        if isinstance(memory, LandmarkMemory):
            return not memory.retrieve
        return layout == "zigzag" or not isinstance(memory, HmtMemory) or bool(memory.search_from)

    return [name for name in MEMORIES if fits(config_of(Case(memory=name)).memory)]


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("size", "exchange", "layout"),
    [(2, "ring", "zigzag"), (2, "all_gather", "contiguous"), (4, "ring", "zigzag")],
)
def test_every_memory_is_one_processs(size: int, exchange: str, layout: str) -> None:
    ranks = run_ranks(size, on_a_rank, exchange, layout)
    for name in fitting(layout):
        expected = two_steps(name, None, None)
        for rank in ranks:  # the state is the same everywhere
            assert_each(rank[name], expected, 1e-10)
