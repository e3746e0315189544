"""Very long streams: every number stays finite, and the state stays as large as it was."""

from typing import Any

import pytest
import torch

from model.config import (
    AbcMemory,
    ArmtMemory,
    CmabMemory,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    LandmarkMemory,
    MemoryConfig,
    NoMemory,
    RmtMemory,
    WindowMemory,
    compose,
)
from model.memory import MEMORIES
from model.memory.base import compact, named_tensors
from tests.model.small import VOCAB, build, config_of

AT_ONCE, LENGTH = 200, 4

IN_A_LAYER: dict[str, MemoryConfig] = {
    "none": NoMemory(),
    "window": WindowMemory(1),
    # fam's published state grows without bound (test_fam): no stream of it can be this long.
    "fam-norm": FamMemory(slots=3, state="norm"),
    "fam-latch": FamMemory(slots=3, state="latch"),
    "infini-linear": InfiniMemory(),
    "infini-delta": InfiniMemory("delta"),
    "abc": AbcMemory(slots=3),
    "cmab": CmabMemory(latents=3),
    "composed": compose([WindowMemory(1), InfiniMemory("delta"), AbcMemory(slots=2)]),
    "landmark": LandmarkMemory(block=2, window=1),  # what it can retrieve grows, by design
}

IN_TURN: dict[str, MemoryConfig] = {
    "rmt-paper": RmtMemory(slots=2),
    "rmt-norm": RmtMemory(slots=2, state="norm"),
    "rmt-latch": RmtMemory(slots=2, state="latch"),
    "armt": ArmtMemory(slots=2, key_dim=4),
    "hmt": HmtMemory(bank=4, sensory=2, search_dim=4),
}
"""2 ms a segment: 10,000 of them are 20 s."""


def state_bytes(state: Any) -> int:
    return sum(x.numel() * x.element_size() for x in named_tensors(state, "").values())


def stream(memory: MemoryConfig, segments: int) -> set[int]:
    """Assert that logits and state are finite all the way; return the sizes of the state."""
    model = build(config_of(memory), torch.float32)
    generator = torch.Generator().manual_seed(0)
    starts = torch.zeros(1, AT_ONCE, dtype=torch.bool)
    state, sizes = None, set()
    for _ in range(segments // AT_ONCE):
        tokens = torch.randint(0, VOCAB, (1, AT_ONCE, LENGTH), generator=generator)
        with torch.no_grad():
            logits, state = model(tokens, starts, state)
        assert logits.isfinite().all()
        for name, x in named_tensors(compact(state), "").items():
            assert x.isfinite().all(), name  # weights of slots too: they have been written
        sizes.add(state_bytes(state))
    return sizes


def test_every_memory_is_here() -> None:
    assert {memory.name for memory in (IN_A_LAYER | IN_TURN).values()} == MEMORIES.keys()


@pytest.mark.parametrize("memory", IN_A_LAYER.values(), ids=IN_A_LAYER.keys())
@pytest.mark.parametrize("segments", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_segments_at_once_stay_finite_in_a_state_of_one_size(
    memory: MemoryConfig, segments: int
) -> None:
    assert len(stream(memory, segments)) == 1


@pytest.mark.parametrize("segments", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_what_is_retrieved_stays_finite_while_the_store_grows(segments: int) -> None:
    assert len(stream(LandmarkMemory(block=2, window=1, retrieve=2), segments)) > 1


@pytest.mark.parametrize("memory", IN_TURN.values(), ids=IN_TURN.keys())
@pytest.mark.parametrize("segments", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_segments_in_turn_stay_finite_in_a_state_of_one_size(
    memory: MemoryConfig, segments: int
) -> None:
    assert len(stream(memory, segments)) == 1
