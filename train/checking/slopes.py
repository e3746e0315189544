"""Does one process's own backward pass give the slope of its loss?

A layout is compared with one process, so what both have wrong would pass: a `detach` in a memory's
recurrence, a hand-written backward. Differences of the loss know nothing of either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from train.checking.batches import make_batches
from train.checking.plain import begin, scale_of, windows
from train.checking.shrink import STEPS
from train.reading.curriculum import segment_limit
from train.settings.config import Config

STEPS_OF_SIZE = (1e-5, 1e-6, 1e-7)
"""Of a parameter's size, the first first: in float64 its slope is right to about 1e-8. Where the
loss bends sharply (a latch of beta 16) a smaller one is, by its square; a wrong gradient is wrong
beside all three."""

TOLERANCE = 1e-5


def slope_errors(config: Config, model_config: ModelConfig) -> dict[str, float]:
    """Return by parameter how far its gradient is from the slope, along one random direction.

    Of the first BPTT window of the first step in which documents are whole (a curriculum's first
    ones cut the memory); float64. Relative to the slope that a gradient of this size has along a
    random direction.
    """
    model = begin(config, model_config, torch.float64)
    number = next(step for step in range(STEPS) if segment_limit(config, step) is None)
    batch, window = make_batches(config)[number], windows(config)[0]

    def loss() -> Tensor:
        output = model(
            batch.tokens[:, window],
            batch.starts[:, window],
            None,
            labels=batch.labels[:, window],
            scale=scale_of(batch, torch.float64),
            step=number,
            documents=None if batch.documents is None else batch.documents[:, window],
        )
        result: Tensor = output.loss
        return result

    loss().backward()
    generator, found = torch.Generator().manual_seed(2), {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        usual = float(parameter.grad.norm() * way.norm()) / parameter.numel() ** 0.5
        expected, errors = float((parameter.grad * way).sum()), []
        for step in STEPS_OF_SIZE:
            errors.append(abs(_slope(loss, parameter, way, step) - expected))
            if errors[-1] <= TOLERANCE * usual:
                break
        found[name] = min(errors) / usual if usual > 0 else min(errors)
    return found


@torch.no_grad()
def _slope(loss: Callable[[], Tensor], parameter: nn.Parameter, way: Tensor, step: float) -> float:
    """Return the central difference of the loss along a way, a step of the parameter's size."""
    size = step * float(parameter.square().mean().sqrt().clamp(min=1e-2))
    parameter.add_(way, alpha=size)
    above = loss().item()
    parameter.sub_(way, alpha=2 * size)
    below = loss().item()
    parameter.add_(way, alpha=size)
    return (above - below) / (2 * size)
