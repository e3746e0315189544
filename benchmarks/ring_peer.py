"""The zigzag ring of ring-flash-attention over our kernels, for benchmarks/ring.py.

Half of the keys from before, half of the queries for keys from behind; keys and values are sent as
two messages; gradients travel all the way round, behind them, in float32, and a received buffer is
the next one's to receive. What the kernel takes as a view is not copied. Zhu 2024,
github.com/zhuzilin/ring-flash-attention, zigzag_ring_flash_attn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from model.attention import merge
from model.kernels import Kernel, choose_kernel

ALL = slice(None)
Arrive = Callable[[], list[Tensor]]


class PeerRing:
    """Forward and backward over all ranks, two or more."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        """Return (out, dq, dk, dv) of (q, k, v, upstream) [B, 1, S, H, K]."""
        # A head's rows together, as ours: at 4096 rows the kernel is 8 % faster in bfloat16 for
        # it, the copies counted, and no slower in float32.
        q, k, v, upstream = (x[:, 0].transpose(1, 2).contiguous() for x in (q, k, v, upstream))
        kernel = choose_kernel(q)
        out, lse = self._forward(kernel, q, k, v)
        dq, dk, dv = self._backward(kernel, q, k, v, upstream, out.to(q.dtype), lse)
        return tuple(x.to(q.dtype).transpose(1, 2).unsqueeze(1) for x in (out, dq, dk, dv))

    def _pass_on(self, tensors: list[Tensor], into: list[Tensor] | None = None) -> Arrive:
        following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        received = into or [torch.empty_like(x) for x in tensors]
        operations = []
        for sent, taken in zip(tensors, received, strict=True):
            operations += [
                dist.P2POp(dist.isend, sent, following),
                dist.P2POp(dist.irecv, taken, before),
            ]
        works = dist.batch_isend_irecv(operations)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return received

        return wait

    def _read(self, step: int, length: int) -> tuple[slice, slice]:
        """Return which queries read which keys."""
        if step == 0:
            return ALL, ALL
        return (
            (ALL, slice(0, length // 2)) if step <= self.rank else (slice(length // 2, None), ALL)
        )

    def _forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held, result = [k, v], None
        for step in range(self.size):
            wait = self._pass_on(held) if step + 1 < self.size else None
            rows, part = self._read(step, q.shape[2])
            keys, values = (x[:, :, part] for x in held)
            out, lse = kernel.forward(q[:, :, rows], keys, values, step == 0)
            piece = out.float(), lse
            if result is None:
                result = piece
            elif rows == ALL:
                result = merge(result, piece)
            else:
                late = merge((result[0][:, :, rows], result[1][:, :, rows]), piece)
                result[0][:, :, rows], result[1][:, :, rows] = late
            if wait is not None:
                held = wait()
        assert result is not None
        return result

    def _backward(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        upstream: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        held, sum_q = [k, v], torch.empty(0)
        grads: list[Tensor] = []
        arriving: Arrive | None = None
        for step in range(self.size):
            wait = self._pass_on(held) if step + 1 < self.size else None
            rows, part = self._read(step, q.shape[2])
            asking = [x[:, :, rows] for x in (upstream, q)]
            keys, values = (x[:, :, part] for x in held)
            dq, dk, dv = kernel.backward(
                *asking, keys, values, out[:, :, rows], lse[:, :, rows], step == 0
            )
            if arriving is None:
                sum_q = dq.float()
                # As the kernel lays them out, [B, S, H, K]: what is sent must be contiguous.
                grads = [x.transpose(1, 2).float().contiguous() for x in (dk, dv)]
                arriving = self._pass_on(grads)
            else:
                sum_q[:, :, rows] += dq
                sent, grads = grads, arriving()
                grads[0][:, part] += dk.transpose(1, 2)
                grads[1][:, part] += dv.transpose(1, 2)
                arriving = self._pass_on(grads, into=sent)
            if wait is not None:
                held = wait()
        assert arriving is not None
        dk, dv = (x.transpose(1, 2) for x in arriving())
        return sum_q, dk, dv
