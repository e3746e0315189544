"""Landmark attention in the decoder against the paper's grouped softmax, row by row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ComputeConfig, LandmarkMemory
from model.decoder import Decoder
from model.init import initialise
from model.local import FoldedSequence
from model.memory import block_store
from model.memory.base import detach
from tests.model.slow import assert_twin
from tests.model.slow_layers import SlowLandmark
from tests.model.small import batch_of, build, config_of


@pytest.mark.parametrize("block", [2, 3, 6])
@pytest.mark.parametrize("window", [0, 1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_is_the_papers_grouped_softmax(block: int, window: int, kv_heads: int) -> None:
    """Over window and segment; logits and every gradient; hidden across documents."""
    batch = batch_of(2, 4, 6)
    batch.starts[0, 3] = batch.starts[1, 1] = True
    memory = LandmarkMemory(block, window)
    assert_twin(config_of(memory, num_kv_heads=kv_heads), SlowLandmark, batch)


class Spy(FoldedSequence):
    """Keeps the values that layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def fold(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        v.retain_grad()
        self.values.append(v)
        return super().fold(q, k, v, **more)


@pytest.mark.parametrize("window", [0, 1])
def test_values_of_landmarks_are_never_read(window: int) -> None:
    spy, config = Spy(), config_of(LandmarkMemory(block=3, window=window))
    model, batch = Decoder(config, sequence=spy).double(), batch_of(2, 3, 6)
    initialise(model, config, seed=0)
    model(batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale).loss.backward()
    assert len(spy.values) == config.num_layers
    for v in spy.values:
        assert v.grad is not None
        by_block = v.grad[:, window:].unflatten(2, (-1, 3))  # carried ones are empty
        assert not by_block[:, :, :, -1].any()
        assert by_block[:, :, :, :-1].abs().amax(-1).all()


def test_windows_of_recomputed_blocks_train_alike_and_move_no_store_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint's second forward finds what its first one appended."""
    memory, moves = LandmarkMemory(block=2, window=1, retrieve=2), 0
    moved = block_store._moved

    def count(*given: Any) -> Any:
        nonlocal moves
        moves += 1
        return moved(*given)

    monkeypatch.setattr(block_store, "_moved", count)
    results = []
    for compute in (ComputeConfig("none"), ComputeConfig("block")):
        model, batch = build(config_of(memory), compute=compute), batch_of(2, 12, 4)
        batch.starts[0, 5] = batch.starts[1, 8] = True
        state = None
        for first in range(0, 12, 2):
            part = batch.segments(first, first + 2)
            output = model(part.tokens, part.starts, state, labels=part.labels, scale=part.scale)
            state = detach(output.state)
            before = moves
            output.loss.backward()
            assert first == 0 or moves == before
        results.append({name: x.grad for name, x in model.named_parameters()})
    assert moves > 4
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_nothing_of_the_document_before_is_gated() -> None:
    model, batch = build(config_of(LandmarkMemory(block=2, window=2))), batch_of(1, 4, 6)
    batch.starts[0, 2] = True
    with torch.no_grad():
        before, _ = model(batch.tokens, batch.starts)
        batch.tokens[0, :2] = (batch.tokens[0, :2] + 1) % 50
        after, _ = model(batch.tokens, batch.starts)
    assert torch.equal(before[0, 2:], after[0, 2:])
    assert not torch.equal(before[0, :2], after[0, :2])
