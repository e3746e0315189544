"""Small models and batches."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import ComputeConfig, MemoryConfig, ModelConfig
from model.decoder import Decoder
from model.init import initialise
from model.loss import IGNORE

VOCAB = 50


class Batch(NamedTuple):
    """Tokens and labels [B, N, S], starts [B, N], and the scale of the loss."""

    tokens: Tensor
    starts: Tensor
    labels: Tensor
    scale: Tensor

    def segments(self, first: int, end: int) -> "Batch":
        """Return segments [first, end) of every stream; the scale stays the whole batch's."""
        part = slice(first, end)
        return Batch(self.tokens[:, part], self.starts[:, part], self.labels[:, part], self.scale)

    def rows(self, part: slice) -> "Batch":
        """Return some of the streams."""
        return Batch(self.tokens[part], self.starts[part], self.labels[part], self.scale)


def config_of(memory: MemoryConfig, **changes: Any) -> ModelConfig:
    """Return a small model's configuration: grouped heads, weights large enough to matter."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 24,
        "head_dim": 8,
        "init_std": 0.3,
    }
    return ModelConfig(**(fields | changes), memory=memory)


def build(
    config: ModelConfig,
    dtype: torch.dtype = torch.float64,
    compute: ComputeConfig | None = None,
    seed: int = 0,
) -> Decoder:
    """Return an initialised model on one device."""
    model = Decoder(config, compute=compute).to(dtype)
    initialise(model, config, seed)
    stir(model, seed)
    return model


def stir(model: Decoder, seed: int = 0) -> None:
    """Move what starts at 1 or 0, where a forgotten weight would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or hasattr(parameter, "initial_value"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def batch_of(batch: int, count: int, length: int, seed: int = 0) -> Batch:
    """Return streams that begin with a document, a few labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, count, length)
    tokens = torch.randint(0, VOCAB, shape, generator=generator)
    labels = torch.randint(0, VOCAB, shape, generator=generator)
    labels[0, -1, : length // 2] = IGNORE
    starts = torch.zeros(batch, count, dtype=torch.bool)
    starts[:, 0] = True
    return Batch(tokens, starts, labels, torch.tensor(1.0 / int((labels != IGNORE).sum())))


def gradients(model: Decoder) -> dict[str, Tensor]:
    """Return every parameter's gradient, and forget it."""
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient for {missing}"
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found
