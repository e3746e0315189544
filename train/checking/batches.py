"""What both sides read: three steps of made-up streams, as uneven as text is."""

from __future__ import annotations

import torch
from torch import Tensor

from data.streams import IGNORE, Batch
from train.checking.shrink import STEPS
from train.reading.landmarks import choose_reading
from train.settings.config import Config


def make_batches(config: Config) -> list[Batch]:
    """Return the steps' batches, of all lanes [B, N, S].

    Labels are drawn apart from tokens, so that a shift of either shows; some are ignored, unequally
    over lanes, segments and places. Documents go on from step to step, and one ends in the middle.
    """
    assert config.model.vocab_size is not None
    vocab_size, landmark = config.model.vocab_size, _is_landmark(config)
    reading = choose_reading(config, vocab_size)
    shape = (config.train.batch_size, config.num_segments, reading.segment_len)
    generator, found = torch.Generator().manual_seed(1), []
    behind = torch.zeros(shape[0], dtype=torch.bool)  # a segment of several documents
    for step in range(STEPS):
        tokens = torch.randint(0, vocab_size - landmark, shape, generator=generator)
        labels = torch.randint(0, vocab_size - landmark, shape, generator=generator)
        if shape[0] > 1:
            labels[0, -1, shape[2] // 3 :] = IGNORE
        labels[-1, :, 1:3] = IGNORE  # few, and not where slices end: one segment may be all
        starts = _starts(shape, step)
        documents = None
        if config.data.packing:
            documents = _documents(shape, generator)
            several = documents[..., -1] > 0
            starts |= torch.cat((behind.unsqueeze(1), several[:, :-1]), 1)
            behind = several[:, -1]
        offsets = torch.zeros(shape[:2], dtype=torch.int64)  # no step reads them
        batch = Batch(tokens, labels, starts, offsets, step * shape[0], documents)
        found.append(reading.prepare(batch))
    return found


def take_lanes(batch: Batch, rows: Tensor) -> Batch:
    """Return some lanes of a batch."""
    return batch._replace(
        tokens=batch.tokens[rows],
        labels=batch.labels[rows],
        starts=batch.starts[rows],
        offsets=batch.offsets[rows],
        first_position=batch.first_position + int(rows[0]),
        documents=None if batch.documents is None else batch.documents[rows],
    )


def _is_landmark(config: Config) -> bool:
    """Return whether the last id of the vocabulary is the landmark's, and no text's."""
    return choose_reading(config, 2).segment_len < config.data.segment_len


def _starts(shape: tuple[int, int, int], step: int) -> Tensor:
    lanes, count, _ = shape
    starts = torch.zeros(lanes, count, dtype=torch.bool)
    starts[:, 0] = step == 0
    if lanes > 1 or step == 1:  # a single lane also has steps without
        starts[min(1, lanes - 1), count // 2] = True
    return starts


def _documents(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return which document each token is of: about one begins in each segment, in some none."""
    begins = torch.rand(shape, generator=generator) < 1.0 / shape[2]
    begins[..., 0] = False
    begins[-1, 0, 1:] = True  # documents of one token
    return begins.cumsum(-1)
