"""The one place that chooses an attention kernel.

A kernel computes one piece of attention and hands back its log-sum-exp, and its backward takes the
*final* (out, lse) of the whole fold: then p = exp(s - lse) is the share of this piece in the total,
and dq, dk, dv of the pieces simply add up (Dao 2023, the FlashAttention-2 backward).
An lse of +inf in backward means "these rows did not read this piece": all its gradients are 0.

Shapes: q, out [B, H, Sq, K]; k, v [B, Hkv, Sk, K] with Hkv dividing H (heads travel unexpanded);
lse [B, H, Sq], float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from model import cpu_flash
from model.compiled import is_compiled


class Kernel(Protocol):
    """Attention over one block of keys, forward and backward."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of softmax(q k^T / sqrt(K)) v."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv of this piece, given the fold's final out and lse."""
        ...


class CpuFlash:
    """aten's blockwise CPU kernel: any float type, grouped heads, strided inputs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv."""
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal
        )
        return grads[0], grads[1], grads[2]


class CpuCompiled(CpuFlash):
    """Our own CPU kernel (cpu_flash.py) where it is faster; bfloat16 and float32."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""
        attend = cpu_flash.forward if cpu_flash.gains(q) else super().forward
        return attend(q, k, v, causal)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv."""
        differentiate = cpu_flash.backward if cpu_flash.gains(q) else super().backward
        return differentiate(dout, q, k, v, out, lse, causal)


class CudaFlash:
    """aten's FlashAttention-2 on CUDA: fp16 and bf16, head_dim a multiple of 8 up to 256."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""
        q, k, v = map(_aligned, (q, k, v))
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
        return result[0], result[1]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv."""
        dout, q, k, v, out = map(_aligned, (dout, q, k, v, out))
        # Without dropout the kernel never reads its random state; it only wants two tensors.
        unused = torch.zeros((), dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous(),  # read as dense [B, H, Sq], unchecked: a slice of rows is not
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            unused,
            unused,
        )
        return grads[0], grads[1], grads[2]


def _aligned(x: Tensor) -> Tensor:
    """Return x with rows that begin at multiples of 16 bytes: so the kernel reads, unchecked."""
    steps = (x.storage_offset(), *x.stride()[:-1])
    whole = all(step * x.element_size() % 16 == 0 for step in steps)
    return x if whole else x.clone(memory_format=torch.contiguous_format)


class Blockwise:
    """Plain torch over blocks of query rows (Liu & Abbeel 2023): any device, any float type.

    Never holds more than `rows` x Sk scores a head. The slow twin of the fused kernels.
    """

    rows = 256

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""
        outs, lses = [], []
        for start in range(0, q.shape[2], self.rows):
            scores, _ = self._scores(q, k, causal, start)
            lse = scores.logsumexp(-1)
            p = torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype)
            outs.append((p @ _expand(v, q)).to(q.dtype))
            lses.append(lse)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv."""
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
        wide_k, wide_v = _expand(k, q), _expand(v, q)
        for start in range(0, q.shape[2], self.rows):
            rows = slice(start, start + self.rows)
            scores, scale = self._scores(q, k, causal, start)
            p = torch.exp(scores - lse[:, :, rows, None])
            do = dout[:, :, rows]
            dp = (do @ wide_v.transpose(-1, -2)).to(lse.dtype)
            share = (do * out[:, :, rows]).sum(-1, keepdim=True, dtype=lse.dtype)
            ds = (p * (dp - share) * scale).to(q.dtype)
            dq[:, :, rows] = ds @ wide_k
            dv += _reduce(p.to(q.dtype).transpose(-1, -2) @ do, v)
            dk += _reduce(ds.transpose(-1, -2) @ q[:, :, rows], k)
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _scores(self, q: Tensor, k: Tensor, causal: bool, start: int) -> tuple[Tensor, float]:
        scale = q.shape[-1] ** -0.5
        rows = q[:, :, start : start + self.rows]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        scores = (rows @ _expand(k, q).transpose(-1, -2)).to(wide) * scale
        if causal:
            row = torch.arange(start, start + rows.shape[2], device=q.device)
            column = torch.arange(k.shape[2], device=q.device)
            scores = scores.masked_fill(column > row.unsqueeze(-1), float("-inf"))
        return scores, scale


def _expand(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _reduce(dx: Tensor, x: Tensor) -> Tensor:
    """Sum the gradient of expanded heads [B, H, S, K] back to the heads of x [B, Hkv, S, K]."""
    b, h, s, d = dx.shape
    return dx.view(b, x.shape[1], h // x.shape[1], s, d).sum(2)


def choose_kernel(q: Tensor) -> Kernel:
    """Return the fastest kernel that takes q's device and type."""
    if q.device.type == "cpu":
        return CpuCompiled() if is_compiled() and cpu_flash.takes(q.dtype) else CpuFlash()
    if q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        return CudaFlash()
    return Blockwise()
