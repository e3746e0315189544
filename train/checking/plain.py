"""Three steps in one plain process: what every layout must equal.

Written apart from training, down to the optimizer, and imports neither of the parallel packages:
what both got wrong alike could not be found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.streams import IGNORE, Batch
from model.config import ComputeConfig, ModelConfig
from model.decoder import Decoder
from model.init import Shape, Take, initial_value, initialise
from model.lora import B
from model.memory.base import Carried, detach
from train.checking.batches import make_batches
from train.reading.curriculum import cut_documents, segment_limit
from train.schedule import learning_rate
from train.settings.config import Config


class Step(NamedTuple):
    """What one optimizer step shows."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]  # whole parameters, before clipping


class Trained(NamedTuple):
    """Three steps, and the weights after them."""

    steps: list[Step]
    weights: dict[str, Tensor]


def train(config: Config, model_config: ModelConfig, dtype: torch.dtype) -> Trained:
    """Return what one process computes with in dtype; masters, moments and sums are wider.

    Weights begin rounded to bfloat16 where the run's do, whatever dtype is.
    """
    model = begin(config, model_config, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamW(trained, config, wide)
    state: Carried | None = None
    passed, steps = None, []
    for number, batch in enumerate(make_batches(config)):
        starts = cut_documents(batch.starts, segment_limit(config, number))
        scale = scale_of(batch, wide)
        gradients = {name: torch.zeros(p.shape, dtype=wide) for name, p in trained.items()}
        loss = 0.0
        for window in windows(config):
            output = model(
                batch.tokens[:, window],
                starts[:, window],
                state,
                labels=batch.labels[:, window],
                scale=scale,
                passed=passed,
                step=number,
                documents=None if batch.documents is None else batch.documents[:, window],
            )
            output.loss.backward()
            for name, p in trained.items():
                if p.grad is not None:  # what only makes the state has none where nobody reads it
                    gradients[name] += p.grad
                p.grad = None
            loss += output.loss.item()
            state = detach(output.state)
        if config.model.memory.state_passing:  # always, in a shrunk configuration
            assert state is not None
            passed = model.memory.handed_on(state)
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt().item()
        steps.append(Step(loss, norm, gradients))
        optimizer.step(gradients, norm, learning_rate(config.train, number))
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    return Trained(steps, optimizer.masters | frozen)


def begin(config: Config, model_config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """Return the model with its first weights."""
    # exact, it rounds nothing
    fp8 = config.train.fp8 and dtype == torch.bfloat16
    model = Decoder(model_config, compute=ComputeConfig(fp8=fp8))
    initialise(model, model_config, config.seed)
    enliven(model, model_config, config.seed)
    if config.train.precision == "bf16":
        model.bfloat16()
    return model.to(dtype)


def enliven(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    *,
    shape: Shape = lambda parameter: parameter.shape,
    take: Take = lambda parameter, whole: whole,
) -> None:
    """Draw what begins at 0: behind it others have no gradient, and of its own all is way.

    shape and take: as of model.init.initialise.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith(".bias"):
                parameter.fill_(1.0)
            elif name.endswith(B):
                whole = initial_value(name, shape(parameter), config, seed, parameter.device)
                parameter.copy_(take(parameter, whole))


def windows(config: Config) -> list[slice]:
    """Return the segments of each BPTT window."""
    size = config.bptt_segments
    return [slice(first, first + size) for first in range(0, config.num_segments, size)]


def scale_of(batch: Batch, dtype: torch.dtype) -> Tensor:
    """Return 1 / the number of targets."""
    return torch.tensor(1.0 / int((batch.labels != IGNORE).sum()), dtype=dtype)


class AdamW:
    """Loshchilov & Hutter 2019, over masters in the wide type; clipping as torch does."""

    def __init__(self, trained: dict[str, nn.Parameter], config: Config, wide: torch.dtype) -> None:
        self.trained, self.config, self.count = trained, config.train, 0
        self.masters = {name: p.detach().to(wide, copy=True) for name, p in trained.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.masters.items()}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], norm: float, lr: float) -> None:
        """Update masters, and the model's weights from them."""
        own, self.count = self.config, self.count + 1
        clipped = min(1.0, own.clip / (norm + 1e-6))
        for name, parameter in self.trained.items():
            gradient, master = gradients[name] * clipped, self.masters[name]
            scale = getattr(parameter, "lr_scale", None)
            rate = lr * (scale or 1.0)
            if scale is None and parameter.dim() > 1:
                master *= 1 - rate * own.weight_decay
            self.first[name].lerp_(gradient, 1 - own.beta1)
            self.second[name].lerp_(gradient.square(), 1 - own.beta2)
            mean = self.first[name] / (1 - own.beta1**self.count)
            square = self.second[name] / (1 - own.beta2**self.count)
            master -= rate * mean / (square.sqrt() + own.eps)
            parameter.copy_(master)
