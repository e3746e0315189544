"""The models and the tokens of the parts."""

from __future__ import annotations

import torch

from benchmarks.gpu.measure import DEVICE, HALF
from data.landmarks import insert_landmarks
from data.streams import Batch
from model.config import ComputeConfig, LandmarkMemory, MemoryConfig, ModelConfig
from model.decoder import Decoder
from model.init import initialise

VOCAB = 32000
MIDDLE = (8, 2048, 16, 4, 5632, 128)
"""Layers, width, heads, key heads, FFN, head_dim: half a billion weights."""

EIGHT_B = (1, 4096, 32, 8, 14336, 128)
"""One layer of an 8B model."""

TOY = (2, 64, 4, 2, 128, 16)
Sizes = tuple[int, int, int, int, int, int]


def shape(sizes: Sizes, memory: MemoryConfig, vocab: int = VOCAB) -> ModelConfig:
    """Return a model of these sizes, with a landmark in its vocabulary if its memory wants one."""
    return ModelConfig(vocab + isinstance(memory, LandmarkMemory), *sizes, memory=memory)


def on_device(config: ModelConfig, compute: ComputeConfig | None = None) -> Decoder:
    """Return a model with its first weights, bfloat16."""
    with DEVICE:
        model = Decoder(config, compute=compute)
    initialise(model, config, 0)
    return model.to(HALF)


def document(memory: MemoryConfig, segments: int, length: int, vocab: int = VOCAB) -> Batch:
    """Return random tokens of one document, landmarks among them where the memory wants them."""
    ids = torch.randint(0, vocab, (1, segments, length))
    starts = torch.zeros(1, segments, dtype=torch.bool)
    starts[0, 0] = True
    offsets = torch.zeros(1, segments, dtype=torch.int64)
    batch = Batch(ids, ids.roll(-1, -1), starts, offsets, first_position=0)
    if isinstance(memory, LandmarkMemory):
        return insert_landmarks(batch, memory.block, vocab)
    return batch
