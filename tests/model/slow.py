"""The slow twins' ground: one document, segment by segment, layer by layer, under full masks.

A twin shares nothing with model/ but the weights, by the decoder's names. What every model has is
here: embedding, norm, rotation, projections, the block's end; and the comparison.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.config import ModelConfig
from model.loss import IGNORE
from tests.compare import assert_each, relative
from tests.model.dense import attend
from tests.model.small import VOCAB, Batch, build, gradients

EXACT = 1e-10
"""float64: rounding of a few thousand operations (1e-13 measured), with room."""


class Raw(NamedTuple):
    """A layer's maps of T rows, not rotated."""

    q: Tensor  # [T, H, K]
    k: Tensor  # [T, Hkv, K]
    v: Tensor
    extra: Tensor  # [T, Hkv, E]


class Read(NamedTuple):
    """Keys that queries read, rotated, and which of them each reads."""

    k: Tensor  # [F, Hkv, K]
    v: Tensor
    mask: Tensor  # [T, F] bool


class Slow:
    """The model of `config` with weights by the decoder's parameter names."""

    counts: list[int] | None = None  # how many segments each segment stands for; None: one

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [N, S] of one document -> [N, S, V]."""
        raise NotImplementedError

    def embed(self, tokens: Tensor) -> Tensor:
        return self.weights["embedding.weight"][tokens]

    def head(self, rows: Tensor) -> Tensor:
        logits = self.norm(rows, "head.norm.weight") @ self.weights["head.output.weight"].T
        return logits[..., : self.config.vocab_size]

    def project(self, layer: int, rows: Tensor) -> Raw:
        """For each kv head the weight has its query heads, its k, its v, what a memory adds."""
        config = self.config
        group = config.num_heads // config.num_kv_heads
        h = self.norm(rows, f"blocks.{layer}.attention_norm.weight")
        flat = h @ self.weights[f"blocks.{layer}.qkv.linear.weight"].T
        if self.config.qkv_bias:
            flat = flat + self.weights[f"blocks.{layer}.qkv.linear.bias"]
        by_head = flat.view(len(rows), config.num_kv_heads, -1)
        own = (group + 2) * config.head_dim
        heads = by_head[..., :own].unflatten(2, (group + 2, config.head_dim))
        q = heads[:, :, :group].reshape(len(rows), config.num_heads, config.head_dim)
        return Raw(q, heads[:, :, group], heads[:, :, group + 1], by_head[..., own:])

    def attend(self, q: Tensor, reads: list[Read]) -> Tensor:
        """q [T, H, K] -> [T, H, K]: one softmax over all reads."""
        k, v = torch.cat([read.k for read in reads]), torch.cat([read.v for read in reads])
        return attend(q, k, v, torch.cat([read.mask for read in reads], 1))[0]

    def finish(self, layer: int, residual: Tensor, attended: Tensor) -> Tensor:
        """A = attended W + residual; FF(norm(A)) + A."""
        weights, name = self.weights, f"blocks.{layer}"
        a = attended.flatten(1) @ weights[f"{name}.output.weight"].T + residual
        h = self.norm(a, f"{name}.ffn_norm.weight") @ weights[f"{name}.ffn.gate_up.weight"].T
        gate, up = h[:, : self.config.ffn_size], h[:, self.config.ffn_size :]
        return (functional.silu(gate) * up) @ weights[f"{name}.ffn.down.weight"].T + a

    def norm(self, rows: Tensor, name: str) -> Tensor:
        return self.plain_norm(rows) * self.weights[name]

    def plain_norm(self, rows: Tensor) -> Tensor:
        return rows / (rows.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()

    def carried(self, rows: Tensor, kind: str, beta: float, gain: str) -> Tensor:
        """What is fed back of rows: as they are, normalised, or latched."""
        if kind == "paper":
            return rows
        normed = self.plain_norm(rows)
        return self.weights[gain] * (normed if kind == "norm" else torch.tanh(beta * normed))

    def rotate(self, x: Tensor, places: Tensor) -> Tensor:
        """RoPE as complex numbers: x [T, H, K]."""
        half = self.config.head_dim // 2
        speed = torch.exp(-math.log(self.config.rope_base) * torch.arange(half).double() / half)
        speed = torch.stack([self.slowed(one) for one in speed])
        angles = places[:, None] * speed
        turn = torch.polar(torch.ones_like(angles), angles)
        z = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
        return torch.cat((z.real, z.imag), -1)

    def slowed(self, speed: Tensor) -> Tensor:
        """One frequency after RopeScaling, by the wavelengths that Llama 3.1's code speaks of."""
        scaling = self.config.rope_scaling
        if scaling.type == "none":
            return speed
        if scaling.type == "linear":
            return speed / scaling.factor
        wavelength = 2 * math.pi / speed
        if wavelength < scaling.original_len / scaling.high_freq_factor:
            return speed
        if wavelength > scaling.original_len / scaling.low_freq_factor:
            return speed / scaling.factor
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        share = (scaling.original_len / wavelength - low) / (high - low)
        return (1 - share) * speed / scaling.factor + share * speed

    def window(self, past: list[tuple[Tensor, Tensor]], queries: int) -> list[Read]:
        """The rotated keys and values of the last M segments: every query reads them all."""
        kept = past[-self.config.window :] if self.config.window else []
        return [Read(k, v, torch.ones(queries, len(k), dtype=torch.bool)) for k, v in kept]


def causal(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool).tril()


def documents(starts: Tensor) -> list[slice]:
    """Where the documents of a stream are: starts [N] bool."""
    begin = [n for n in range(len(starts)) if n == 0 or starts[n]]
    return [slice(a, b) for a, b in zip(begin, [*begin[1:], len(starts)], strict=True)]


def assert_twin(
    config: ModelConfig,
    twin: Callable[[ModelConfig, dict[str, Tensor]], Slow],
    batch: Batch,
    *,
    step: int | None = None,
    counts: Tensor | None = None,
) -> None:
    """Assert that the decoder's logits, losses and every gradient are the twin's.

    counts [B, N] int64: how many segments each stands for.
    """
    model = build(config)
    weights = None if counts is None else counts.double().log()
    output = model(
        batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale, step=step,
        weights=weights,
    )  # fmt: skip
    output.loss.backward()
    with torch.no_grad():
        found, _ = model(batch.tokens, batch.starts, step=step, weights=weights)

    leaves = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    streams = []
    for row, starts in enumerate(batch.starts):
        parts = []
        for part in documents(starts):
            slow = twin(config, leaves)
            slow.counts = None if counts is None else counts[row, part].tolist()
            parts.append(slow.logits(batch.tokens[row, part]))
        streams.append(torch.cat(parts))
    logits = torch.stack(streams)
    losses = functional.cross_entropy(
        logits.flatten(0, 2), batch.labels.flatten(), reduction="none", ignore_index=IGNORE
    )
    (losses.sum() * batch.scale).backward()
    assert relative(found[..., :VOCAB], logits) < EXACT
    assert relative(output.token_losses.flatten(), losses) < EXACT
    expected = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in leaves.items()}
    assert_each(gradients(model), expected, EXACT)
