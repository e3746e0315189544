"""Blocks that score alike: the choice is the newest, whatever else lies in the store."""

import torch

from model.config import LandmarkMemory
from tests.compare import relative
from tests.model.small import VOCAB, batch_of, build, config_of


def test_in_the_lowest_layer_all_landmarks_are_alike_and_the_choice_is_one() -> None:
    """One landmark token: with gradients or without, from the start or carried, the same logits."""
    model = build(config_of(LandmarkMemory(block=4, window=1, retrieve=2)))
    batch = batch_of(2, 12, 8)
    batch.starts[1, 3] = batch.starts[0, 7] = True
    batch.tokens[..., 3::4] = VOCAB - 1
    with_grad, _ = model(batch.tokens, batch.starts)
    with torch.no_grad():
        without, _ = model(batch.tokens, batch.starts)
        state, parts = None, []
        for n in range(12):
            part = batch.segments(n, n + 1)
            logits, state = model(part.tokens, part.starts, state)
            parts.append(logits)
    assert relative(without, with_grad) < 1e-10
    assert relative(torch.cat(parts, 1), with_grad) < 1e-10
