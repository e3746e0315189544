"""The parts of a block: RMSNorm, the grouped QKV projection, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.compiled import fused
from model.config import ComputeConfig, ModelConfig
from model.interfaces import Linears
from model.precision import sum_dtype
from model.recompute import recomputed


def scattered(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter that meets rows scattered over tensor-parallel ranks.

    Under sequence parallelism each rank then has a part of its gradient only; the layout sums it.
    `sequence_parallel` is megatron-core's name for this mark.
    """
    parameter.sequence_parallel = True  # type: ignore[attr-defined]
    return parameter


def starts_at(parameter: nn.Parameter, value: float) -> nn.Parameter:
    """Mark a parameter that begins with one value; see init.initialise."""
    parameter.initial_value = value  # type: ignore[attr-defined]
    return parameter


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = scattered(nn.Parameter(torch.ones(features)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x [..., features], in the weight's type."""
        return scaled(x, self.weight, self.eps)


@fused
def scaled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last dimension, in the weight's type."""
    return normalise(x, eps).to(weight.dtype) * weight


def normalise(x: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) over the last dimension, float32 or wider."""
    wide = x.to(sum_dtype(x))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class QKV(nn.Module):
    """Queries, keys and values in one map, and what a memory wants beside them.

    Rows of the weight, and of the bias where there is one, are grouped by key-value head,
    [q_1 .. q_g, k, v, extra] of each in turn: a plain cut of the rows keeps each group on one
    tensor-parallel rank.
    """

    def __init__(
        self, config: ModelConfig, linears: Linears, *, extra: int = 0, fp8: bool = False
    ) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = config.num_kv_heads // linears.size, config.head_dim
        group = config.num_heads // config.num_kv_heads
        self.split = (group * config.head_dim, config.head_dim, config.head_dim, extra)
        self.linear = linears.column(
            config.hidden_size,
            config.num_kv_heads * sum(self.split),
            bias=config.qkv_bias,
            fp8=fp8,
        )
        if isinstance(self.linear.bias, nn.Parameter):
            starts_at(self.linear.bias, 0.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """X [rows, D] -> q [all rows, H, K], k and v [all rows, Hkv, K], extra [all rows, Hkv, E].

        Heads are this rank's.
        """
        heads = self.linear(x).unflatten(-1, (self.num_kv_heads, -1))
        q, k, v, extra = heads.split(self.split, dim=-1)
        return q.unflatten(-1, (-1, self.head_dim)).flatten(-3, -2), k, v, extra


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020), over chunks of tokens if asked.

    With a chunk the intermediate [rows, ffn_size] never exists for all rows, forward or backward
    (Liu & Abbeel 2023, Blockwise Parallel Transformer).
    """

    def __init__(self, config: ModelConfig, linears: Linears, compute: ComputeConfig) -> None:
        super().__init__()
        # Rows come scattered, and a chunk of them is gathered inside: so many tokens, not rows.
        chunk = compute.ffn_chunk
        self.chunk = None if chunk is None else -(-chunk // linears.scattered)
        self.selective = compute.checkpointing == "selective"
        hidden, ffn, fp8 = config.hidden_size, config.ffn_size, compute.fp8
        self.gate_up = linears.column(hidden, 2 * ffn, stride=2, fp8=fp8)
        self.down = linears.row(ffn, hidden, fp8=fp8)

    def forward(self, x: Tensor) -> Tensor:
        """X [rows, D] -> [rows, D]."""
        if self.chunk is not None and x.shape[0] > self.chunk:
            return self._in_chunks(self._all, x)
        if self.selective:
            result: Tensor = recomputed(_gated, self.gate_up(x), self.down)
            return result
        return self._all(x)

    def behind(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """Return what forward gives for norm(x), without keeping that, with selective."""
        if not self.selective:
            return self.forward(norm(x))
        if self.chunk is not None and x.shape[0] > self.chunk:
            return self._in_chunks(lambda part: self._all(norm(part)), x)
        result: Tensor = recomputed(norm, x, self.forward)
        return result

    def _in_chunks(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        assert self.chunk is not None
        parts = x.split(self.chunk)
        if not torch.is_grad_enabled():
            return torch.cat([run(part) for part in parts])
        return torch.cat(
            [checkpoint(run, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )

    def _all(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(_gated(self.gate_up(x)))
        return result


@fused
def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up
