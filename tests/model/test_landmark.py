"""Landmark attention in the decoder against the paper's grouped softmax, row by row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import LandmarkMemory
from model.decoder import Decoder
from model.init import initialise
from model.local import FoldedSequence
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


def test_nothing_of_the_document_before_is_gated() -> None:
    model, batch = build(config_of(LandmarkMemory(block=2, window=2))), batch_of(1, 4, 6)
    batch.starts[0, 2] = True
    with torch.no_grad():
        before, _ = model(batch.tokens, batch.starts)
        batch.tokens[0, :2] = (batch.tokens[0, :2] + 1) % 50
        after, _ = model(batch.tokens, batch.starts)
    assert torch.equal(before[0, 2:], after[0, 2:])
    assert not torch.equal(before[0, :2], after[0, :2])
