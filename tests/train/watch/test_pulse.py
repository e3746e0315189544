"""A rank's place names the segment where segments go through the layers in turn."""

from __future__ import annotations

import pytest
import torch

from model.config import ArmtMemory, ComputeConfig, HmtMemory, MemoryConfig, ModelConfig, RmtMemory
from model.decoder import Decoder
from model.init import initialise
from train.watch.pulse import Place, Pulse, follow_layers, follow_segments


class Recorded(Pulse):
    """A pulse that keeps each place of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[Place] = []

    def layer(self, layer: int, direction: str) -> None:
        super().layer(layer, direction)
        self.places.append(self.place())


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize(
    "memory", [RmtMemory(2), ArmtMemory(2, 4), HmtMemory(bank=4, sensory=2, search_dim=8)]
)
def test_forward_and_backward_of_each_segment_are_told(
    memory: MemoryConfig, checkpointing: str
) -> None:
    config = ModelConfig(32, 2, 16, 2, 2, 16, 8, memory=memory)
    model = Decoder(config, compute=ComputeConfig(checkpointing=checkpointing))
    initialise(model, config, 0)
    pulse = Recorded()
    follow_layers(model.blocks, pulse)
    follow_segments(model.memory, pulse)
    pulse.enter("step", 5)
    pulse.window(1, 4, 6)
    tokens = torch.arange(24).view(1, 3, 8)
    output = model(tokens, torch.zeros(1, 3, dtype=torch.bool), labels=tokens, scale=torch.ones(()))
    output.loss.backward()
    for direction in ("forward", "backward"):
        told = [
            place.segments
            for place in pulse.places
            if place.direction == direction and place.layer == 0 and place.segments != (4, 6)
        ]
        assert set(told) == {(4, 4), (5, 5), (6, 6)}, told
        assert told == sorted(told, reverse=direction == "backward") or checkpointing == "block"
    words = {str(place) for place in pulse.places}
    assert "step 5, micro-batch 1, segment 5, backward of layer 1" in words
