"""Passkey retrieval in small: trained in minutes on one core, to see whether memory carries.

Curriculum (what makes it learnable): the key first lies in the question's own segment or the one
before, then 2, 3, ... segments before; the next distance comes when most answers are right.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from data.streams import IGNORE
from data.tasks import KEY_DIGITS, PASSKEY_VOCAB, passkeys
from model.config import MemoryConfig, ModelConfig
from model.decoder import Decoder
from model.init import initialise

SEGMENT_LEN = 64
BATCH = 32


def passkey_model(memory: MemoryConfig) -> ModelConfig:
    """Return the miniature: 2 layers of width 64, under 0.1M parameters."""
    return ModelConfig(PASSKEY_VOCAB, 2, 64, 4, 4, 128, 16, init_std=0.07, memory=memory)


def train_passkey(
    memory: MemoryConfig,
    *,
    seed: int,
    distance: int,
    max_steps: int,
    lr: float = 2e-3,
    say: Callable[[str], None] = lambda text: None,
) -> Decoder:
    """Return a model trained on keys up to `distance` segments back, full BPTT.

    Stops early when keys at `distance` are recalled. max_steps bounds the work, not the time, so a
    seed gives the same model on any machine.
    """
    rng = np.random.default_rng(seed)
    config = passkey_model(memory)
    model = Decoder(config)
    initialise(model, config, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    stage, recalled, began = 1, 0.0, time.process_time()
    for step in range(max_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50)
        # Keys near the question teach the copying that far ones need.
        near = stage == 1 and recalled < 0.5 and rng.random() < 0.3
        at = 0 if near else stage if rng.random() < 0.7 else int(rng.integers(1, stage + 1))
        loss, exact = _batch(model, rng, at, BATCH)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if at == stage:
            recalled += 0.05 * (exact - recalled)
        if step % 100 == 99:
            seconds = time.process_time() - began
            say(f"step {step + 1}: distance {stage}, recalled {recalled:.2f}, {seconds:.0f} CPU s")
        if recalled > 0.9:
            if stage == distance:
                say(f"recalled {recalled:.2f} at distance {distance} after {step + 1} steps")
                break
            stage, recalled = stage + 1, 0.5
    return model


@torch.no_grad()
def recall(model: Decoder, *, distance: int, seed: int, prompts: int = 128) -> float:
    """Return the share of prompts whose 4 digits are all right, key `distance` segments back."""
    rng = np.random.default_rng(seed)
    return _batch(model, rng, distance, prompts)[1]


def _batch(
    model: Decoder, rng: np.random.Generator, distance: int, batch: int
) -> tuple[torch.Tensor, float]:
    task = passkeys(
        rng, batch=batch, segments=distance + 1, segment_len=SEGMENT_LEN, distance=distance
    )
    tokens, labels = torch.from_numpy(task.tokens), torch.from_numpy(task.labels)
    starts = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    logits, _ = model(tokens, starts)
    wanted = labels != IGNORE
    loss = torch.nn.functional.cross_entropy(logits[wanted], labels[wanted])
    right = (logits.argmax(-1) == labels)[wanted].view(batch, KEY_DIGITS)
    return loss, right.all(-1).float().mean().item()
