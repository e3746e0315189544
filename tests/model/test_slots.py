"""Slots as running means (abc, cmab) against one softmax over everything read."""

import pytest
import torch

from model.config import (
    AbcMemory,
    CmabMemory,
    InfiniMemory,
    MemoryConfig,
    WindowMemory,
    compose,
)
from model.memory.base import Projected
from model.memory.slots import AbcPart
from tests.compare import relative
from tests.model.slow import EXACT, assert_twin
from tests.model.slow_layers import InLayers
from tests.model.small import batch_of, build, config_of

SLOTS = {
    "abc": AbcMemory(slots=3),
    "abc-window-2": AbcMemory(slots=3, window=2),
    "cmab": CmabMemory(latents=3),
    "cmab-window-1": CmabMemory(latents=3, window=1),
    "both-and-infini": compose(
        [WindowMemory(1), AbcMemory(slots=2), InfiniMemory(), CmabMemory(latents=3)]
    ),
}
EACH = pytest.mark.parametrize("memory", SLOTS.values(), ids=SLOTS.keys())
ALONE = pytest.mark.parametrize("memory", [AbcMemory(slots=3), CmabMemory(latents=3)])


@EACH
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_is_a_softmax_over_all_past_tokens(memory: MemoryConfig, kv_heads: int) -> None:
    batch = batch_of(2, 5, 6)
    batch.starts[0, 4] = batch.starts[1, 2] = True
    assert_twin(config_of(memory, num_kv_heads=kv_heads), InLayers, batch)


@EACH
def test_a_weight_of_log_c_is_a_segment_read_c_times(memory: MemoryConfig) -> None:
    batch = batch_of(2, 5, 4)
    batch.starts[1, 2] = True
    counts = torch.tensor([[1, 3, 2, 5, 1], [4, 1, 7, 2, 2]])
    assert_twin(config_of(memory), InLayers, batch, counts=counts)


@ALONE
def test_how_the_past_is_cut_in_segments_changes_no_slot(memory: MemoryConfig) -> None:
    """In the first layer: further up, tokens have read slots, of segments before theirs."""
    model, batch, found = build(config_of(memory, num_layers=1)), batch_of(2, 1, 24), []
    for length in (24, 12, 8, 3, 1):
        tokens = batch.tokens.view(2, -1, length)
        starts = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        _, state = model(tokens, starts)
        found.append(state.layers[0].parts[memory.name])
    for slots in found[1:]:
        assert relative(slots.means, found[0].means) < EXACT
        assert relative(slots.lse, found[0].lse) < EXACT


@ALONE
def test_slots_of_a_new_stream_have_no_weight(memory: MemoryConfig) -> None:
    model, batch = build(config_of(memory)), batch_of(2, 1, 4)
    state = model.empty(model.segments(batch.tokens, batch.starts, fresh=True))
    for layer in state.layers:
        slots = layer.parts[memory.name]
        assert (slots.lse == float("-inf")).all()
        assert not slots.means.any()


def test_abc_scores_are_bounded() -> None:
    """One token cannot outweigh a document for ever: e^32 at most, and no overflow."""
    part, like = AbcPart(3), torch.zeros(1, 1, 2, 2, 8)
    extra = torch.tensor([-1e4, 5.0, 1e4]).expand(1, 1, 2, 2, 3)
    scores = part.scores(Projected(like, like, like, extra))
    assert torch.equal(scores[0, 0, 0, 0], torch.tensor([-32.0, 5.0, 32.0]))
