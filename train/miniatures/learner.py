"""A model in training: the step that every recipe shares."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.decoder import Decoder
from model.init import initialise
from model.memory.base import State
from train.miniatures.blocks import Blocks
from train.miniatures.config import Changes, Miniature, StageSection, landmark_of, model_config


class Learner:
    """A decoder, its optimizer and its source of blocks; `begin` opens each stage."""

    def __init__(self, miniature: Miniature, seed: int) -> None:
        self.miniature = miniature
        self.blocks = Blocks(miniature.segment_len, seed, landmark_of(miniature))
        self.steps_done = 0
        config = model_config(miniature, miniature.stages[0].memory)
        self.model = Decoder(config)
        initialise(self.model, config, seed)

    def begin(self, stage: StageSection) -> None:
        """Give the model the stage's memory, and a new optimizer."""
        self.model = with_memory(self.model, self.miniature, stage.memory)
        self.stage, self.step_in_stage = stage, 0
        self.optimizer = make_optimizer(self.model, self.miniature)

    def read(
        self,
        tokens: Tensor,
        state: State = None,
        *,
        starts: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Return the logits [B, N, S, V] and the state after tokens [B, N, S].

        starts [B] bool: a document begins with the first block (it does where state is None).
        """
        return read(self.model, tokens, state, starts=starts, weights=weights)

    def learn(self, loss: Tensor) -> None:
        """Make one step of AdamW at this step's rate."""
        rate = learning_rate(self.stage, self.step_in_stage)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.miniature.clip)
        self.optimizer.step()
        self.step_in_stage += 1
        self.steps_done += 1


def read(
    model: Decoder,
    tokens: Tensor,
    state: State = None,
    *,
    starts: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Return the logits [B, N, S, V] and the state after tokens [B, N, S]; see Learner.read."""
    begins = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    if starts is not None:
        begins[:, 0] = starts
    more: dict[str, Any] = {} if weights is None else {"weights": weights}
    logits, after = model(tokens, begins, state, **more)
    return logits, after


def grade(given: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss, and which digits [rows, 4] are right, of answers [rows, 4, V]."""
    loss = functional.cross_entropy(given.flatten(0, 1), keys.flatten())
    return loss, given.argmax(-1) == keys


def with_memory(model: Decoder, miniature: Miniature, changes: Changes) -> Decoder:
    """Return the model with other values in its memory's configuration, and the same weights."""
    config = model_config(miniature, changes)
    if config == model.config:
        return model
    changed = Decoder(config)
    # A memory's options may add parameters (a learned norm), which begin as they would anew.
    initialise(changed, config, 0)
    changed.load_state_dict(model.state_dict(), strict=False)
    return changed


def make_optimizer(model: nn.Module, miniature: Miniature) -> torch.optim.AdamW:
    """Return AdamW: matrices decay; embeddings, norms, gains and gates do not.

    A parameter's `lr_scale` multiplies its rate and marks it as a gate. (Infini-attention's gates
    hardly move otherwise, and weight decay draws them back to one half.)
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = float(getattr(parameter, "lr_scale", 1.0))
        matrix = parameter.dim() > 1 and scale == 1.0 and not name.startswith("embedding.")
        decay = miniature.weight_decay if matrix else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (scale, decay), parameters in groups.items()
        ],
        betas=(miniature.beta1, miniature.beta2),
        fused=True,
    )


def learning_rate(stage: StageSection, step: int) -> float:
    """Return the rate of a stage's step, counted from 0: linear warm-up, then a cosine."""
    if step < stage.warmup_steps:
        return stage.lr * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps - 1)
    wave = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return stage.min_lr + (stage.lr - stage.min_lr) * wave
