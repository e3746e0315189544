"""The learning rate of every step, a pure function of the step."""

from __future__ import annotations

import math

from train.settings.training import TrainSection


def learning_rate(train: TrainSection, step: int) -> float:
    """Return the rate of update number `step`, counted from 0.

    Linear warm-up to lr over warmup_steps; then `constant`; `cosine` to min_lr at the last step;
    or `wsd` (warm-up, stable, decay): lr until the last decay_steps, which fall linearly to min_lr.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "wsd":
        assert train.decay_steps is not None
        left = (train.steps - 1 - step) / train.decay_steps
        return train.min_lr + (train.lr - train.min_lr) * max(0.0, min(1.0, left))
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps - 1)
    wave = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return train.min_lr + (train.lr - train.min_lr) * wave
