"""Landmark attention (Mohtashami & Jaggi 2023, arXiv 2305.16300): a token closes each block.

The last position of every block of keys is a landmark. A query reads its own block token by token,
and every earlier block through its landmark: the landmark's score is the block's weight, the
block's own softmax says what is read in it. Blocks lie inside segments and inside ranks' slices.
"""

from __future__ import annotations

from model.config import LandmarkMemory, ModelConfig
from model.memory.grouped import GroupedSoftmax
from model.memory.layered import Layered


class Landmark(Layered):
    """The window's and the segment's keys, grouped by landmarks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert isinstance(config.memory, LandmarkMemory)
        self.kernel = GroupedSoftmax(config.memory.block)
