"""What becomes of text before the model reads it: some memories want landmarks put in.

Lengths of a configuration count what the model reads, landmarks among it; corpora and their streams
know text alone. The landmark is the last id of the model's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from data.landmarks import insert_landmarks, regular_len
from data.streams import Batch
from train.settings.config import Config
from train.settings.memories import LandmarkMemory, find_memory


class Reading(NamedTuple):
    """How a segment of text becomes one of the model's."""

    segment_len: int  # tokens of text in a segment
    prepare: Callable[[Batch], Batch]  # of such segments

    def prepare_tokens(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens and labels [B, N, segment_len] int64 as the model wants them."""
        nothing = torch.zeros(tokens.shape[:2], dtype=torch.int64)
        batch = self.prepare(Batch(tokens, labels, nothing.bool(), nothing, 0))
        return batch.tokens, batch.labels


def choose_reading(config: Config, vocab_size: int) -> Reading:
    """Return how a run's segments are read; vocab_size: the model's."""
    segment_len, block = config.data.segment_len, _block(config)
    if block is None:
        return Reading(segment_len, lambda batch: batch)
    return Reading(
        regular_len(segment_len, block),
        lambda batch: insert_landmarks(batch, block, vocab_size - 1),
    )


def model_vocab_size(config: Config, tokens: int) -> int:
    """Return the ids that a model needs for a corpus of `tokens` ids."""
    return tokens if _block(config) is None else tokens + 1


def _block(config: Config) -> int | None:
    memory = find_memory(config.model.memory, "landmark")
    return memory.block if isinstance(memory, LandmarkMemory) else None
