"""The Recurrent Memory Transformer against full masks, and how far its gradients go back."""

import pytest
import torch

from model.config import MemoryConfig, RmtMemory
from model.loss import IGNORE
from model.memory.base import detach
from tests.model.slow import assert_twin
from tests.model.slow_turns import SlowRmt
from tests.model.small import Batch, batch_of, build, config_of

SEGMENTS = 6
IDS = 8
"""Tokens of segment n are IDS * n and up: rows of the embedding tell segments apart."""


@pytest.mark.parametrize("mask", ["paper", "causal"])
@pytest.mark.parametrize("state", ["paper", "norm", "latch"])
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize("window", [0, 1])
def test_is_the_stack_over_read_tokens_write(
    mask: str, state: str, offset: bool, window: int
) -> None:
    """Logits and every gradient under the full mask of [read | tokens | write]."""
    batch = batch_of(2, 4, 5)
    batch.starts[1, 2] = True
    memory = RmtMemory(slots=3, mask=mask, state=state, offset=offset, window=window)  # type: ignore[arg-type]
    assert_twin(config_of(memory), SlowRmt, batch)


def by_segment() -> Batch:
    batch = batch_of(1, SEGMENTS, 4)
    batch.tokens.remainder_(IDS).add_(IDS * torch.arange(SEGMENTS)[:, None])
    return batch


def reached(memory: MemoryConfig, last: int, window: int) -> set[int]:
    """Return whose tokens the loss in segment `last` has a gradient for, cut every `window`."""
    model, batch = build(config_of(memory)), by_segment()
    batch.labels.clamp_(min=0)[:, torch.arange(SEGMENTS) != last] = IGNORE
    state = None
    for first in range(0, SEGMENTS, window):
        part = batch.segments(first, first + window)
        output = model(part.tokens, part.starts, state, labels=part.labels, scale=part.scale)
        if first <= last < first + window:
            output.loss.backward()
        state = detach(output.state)
    table = model.embedding.weight.grad
    return {n for n in range(SEGMENTS) if table[IDS * n : IDS * (n + 1)].any()}


@pytest.mark.parametrize("state", ["paper", "norm", "latch"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_cut_every_d_plus_1_segments_a_loss_reaches_at_most_d_back(state: str, depth: int) -> None:
    """As train.bptt_len cuts: the last segment of each window reaches D back, the first none."""
    memory = RmtMemory(slots=2, state=state)  # type: ignore[arg-type]
    for last in range(SEGMENTS):
        back = last % (depth + 1)
        assert reached(memory, last, depth + 1) == set(range(last - back, last + 1))


@pytest.mark.parametrize("state", ["paper", "norm", "latch"])
def test_uncut_a_loss_reaches_all_segments(state: str) -> None:
    memory = RmtMemory(slots=2, state=state)  # type: ignore[arg-type]
    assert reached(memory, SEGMENTS - 1, SEGMENTS) == set(range(SEGMENTS))


def test_memory_carried_as_published_is_after_the_final_norm() -> None:
    """Its scale is the norm's gain, not the residual stream's, at every segment."""
    model, batch = build(config_of(RmtMemory(slots=3))), batch_of(2, 4, 5)
    _, state = model(batch.tokens, batch.starts)
    rms = (state.stack.memory / model.head.norm.weight).square().mean(-1).sqrt()
    assert torch.allclose(rms, torch.ones_like(rms), atol=1e-3)
