"""One block of the decoder: the layer's own weights; its mixer says what attends."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from model.config import ComputeConfig, ModelConfig
from model.interfaces import Linears, Segments
from model.layers import QKV, RMSNorm, SwiGLU
from model.memory.base import Initial, Projected, State
from model.memory.frame import Rows
from model.memory.mixer import Mixer
from model.recompute import recomputed


class Block(nn.Module):
    """norm, attention, +, norm, SwiGLU, +, over flat rows; the mixer says what attends."""

    def __init__(
        self, config: ModelConfig, linears: Linears, compute: ComputeConfig, mixer: Mixer
    ) -> None:
        super().__init__()
        self.selective = compute.checkpointing == "selective"
        self.hidden_size, self.head_dim = config.hidden_size, config.head_dim
        self.num_heads = config.num_heads // linears.size
        self.num_kv_heads = config.num_kv_heads // linears.size
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.qkv = QKV(config, linears, extra=mixer.extra, fp8=compute.fp8)
        self.output = linears.row(
            config.num_heads * config.head_dim, config.hidden_size, fp8=compute.fp8
        )
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = SwiGLU(config, linears, compute)
        self.mixer = mixer

    def forward(
        self,
        x: Tensor,
        rows: Rows | None = None,
        segments: Segments | None = None,
        state: State = None,
        initial: Initial = None,
    ) -> Any:
        """Return (token rows, memory rows, state after); without segments, memory rows x alone."""
        if segments is None:
            return self.mixer.alone(self, x)
        return self.mixer.mix(self, x, rows, segments, state, initial)

    def project(self, x: Tensor) -> Projected:
        """Return queries, keys and values of rows x, not rotated."""
        if self.selective:
            return Projected(*recomputed(self.attention_norm, x, self.qkv))
        return Projected(*self.qkv(self.attention_norm(x)))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the block's output: rows x, attended [all rows, H, K] -> [rows, D]."""
        x = x + self.output(attended.flatten(-2))
        return x + self.ffn.behind(self.ffn_norm, x)
