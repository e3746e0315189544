"""Rotary position embedding (Su et al. 2021), half-split pairs as in Llama.

Angles are computed in float64 and rounded once: at position 131072 a float32 product would already
be off by 0.008 rad. Only distances matter, so positions count from the first carried segment: they
stay small however long the stream is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.compiled import fused
from model.config import RopeScaling

UNSCALED = RopeScaling()


def rope_tables(
    positions: Tensor, head_dim: int, base: float, like: Tensor, scaling: RopeScaling = UNSCALED
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [*positions, head_dim / 2], float32 (float64 for a float64 model)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.to(torch.float64).unsqueeze(-1) * _scaled(base**-exponent, scaling)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return angles.cos().to(like.device, dtype), angles.sin().to(like.device, dtype)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Return radians per token [head_dim / 2], slowed down as asked."""
    if scaling.type == "none":
        return frequencies
    slow = frequencies / scaling.factor
    if scaling.type == "linear":
        return slow
    turns = frequencies * scaling.original_len / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(slow, frequencies, kept)


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x rotated: x [..., S, *heads, K]; cos, sin broadcast to [..., S, *ones, K / 2]."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
