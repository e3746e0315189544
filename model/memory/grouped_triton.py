"""Grouped softmax on a GPU: `GroupedSoftmax` as Triton kernels that hold no table of scores.

Forward and dq go over query rows, dk and dv over key blocks, each a program of its own, so nothing
is added to from two sides. A program reads one block of keys at a time: its inner softmax is whole
there, so neither shares nor their sums are kept from forward to backward. Sums are float32.
Import it where a GPU is, or with TRITON_INTERPRET=1 in the environment, which runs it on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.memory.grouped_softmax import GroupedSoftmax

ROWS = 64
"""Query rows of a program."""
_WARPS = 4


class GroupedTriton(GroupedSoftmax):
    """`GroupedSoftmax` in half precision, blocks and head_dim to 128, and in float32, to 64.

    head_dim is a power of two, and 16 at least.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return (out, lse); see GroupedSoftmax."""
        q, k, v = (x.contiguous() for x in (q, k, v))
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        grid = (triton.cdiv(q.shape[2], ROWS), q.shape[0] * q.shape[1])
        _forward[grid](q, k, v, out, lse, **self._sizes(q, k, causal))
        return out, lse

    def backward_of_both(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        said: Tensor,
        lse: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv; see GroupedSoftmax."""
        dout, q, k, v, said, lse = (x.contiguous() for x in (dout, q, k, v, said, lse))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        sizes = self._sizes(q, k, causal)
        rows = (triton.cdiv(q.shape[2], ROWS), q.shape[0] * q.shape[1])
        _backward_rows[rows](dout, q, k, v, said, lse, dq, **sizes)
        blocks = (k.shape[2] // self.block, k.shape[0] * k.shape[1])
        _backward_keys[blocks](dout, q, k, v, said, lse, dk, dv, **sizes)
        return dq, dk, dv

    def _sizes(self, q: Tensor, k: Tensor, causal: bool) -> dict[str, Any]:
        length, kept = q.shape[2], k.shape[2]
        assert kept % self.block == 0, f"{kept} keys are no whole blocks of {self.block}"
        assert not causal or length == kept, (length, kept)
        return {
            "scale": q.shape[-1] ** -0.5,
            "length": length,
            "kept": kept,
            "heads": q.shape[1],
            "kv_heads": k.shape[1],
            "BLOCK": self.block,
            "WIDE": max(16, triton.next_power_of_2(self.block)),
            "DIM": q.shape[-1],
            "HEIGHT": ROWS,
            "CAUSAL": causal,
            "num_warps": _WARPS,
        }


@triton.jit
def _load(base, first, places, limit, DIM: tl.constexpr):
    """Return rows first + places of a [*, DIM] array, 0 where places >= limit."""
    dims = tl.arange(0, DIM)
    at = (first + places).to(tl.int64)[:, None] * DIM + dims[None, :]
    return tl.load(base + at, mask=(places < limit)[:, None], other=0.0)


@triton.jit
def _store(base, first, places, limit, x, DIM: tl.constexpr):
    """Write x to rows first + places of a [*, DIM] array where places < limit."""
    dims = tl.arange(0, DIM)
    at = (first + places).to(tl.int64)[:, None] * DIM + dims[None, :]
    tl.store(base + at, x.to(base.dtype.element_ty), mask=(places < limit)[:, None])


@triton.jit
def _scores(
    q, k, rows, block, scale, BLOCK: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr
):
    """Return (inner, gate, own) of rows against one block of keys.

    inner [rows, WIDE]: the softmax over its regular tokens; gate [rows]: the landmark's score, -inf
    where the block is not a past one; own [rows, WIDE]: scores where it is the row's own, else
    -inf.
    """
    columns = tl.arange(0, WIDE)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    gate = tl.sum(tl.where(columns[None, :] == BLOCK - 1, scores, 0.0), 1)
    regular = tl.where(columns[None, :] < BLOCK - 1, scores, float("-inf"))
    inner = tl.exp(regular - tl.max(regular, 1)[:, None])
    inner = inner / tl.sum(inner, 1)[:, None]
    own = tl.full(regular.shape, float("-inf"), tl.float32)
    if CAUSAL:
        reads = (rows // BLOCK == block)[:, None] & (columns[None, :] <= (rows % BLOCK)[:, None])
        own = tl.where(reads, regular, own)
        gate = tl.where(rows // BLOCK > block, gate, float("-inf"))
    return inner, gate, own


@triton.jit
def _forward(
    q, k, v, out, lse, scale, length, kept, heads, kv_heads,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, DIM: tl.constexpr, HEIGHT: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    head = tl.program_id(1)
    keys = (head // heads * kv_heads + head % heads // (heads // kv_heads)) * kept
    columns = tl.arange(0, WIDE)
    queries = _load(q, head * length, rows, length, DIM)
    top = tl.full([HEIGHT], float("-inf"), tl.float32)
    total = tl.zeros([HEIGHT], tl.float32)
    said = tl.zeros([HEIGHT, DIM], tl.float32)
    blocks = kept // BLOCK
    if CAUSAL:
        blocks = tl.minimum(blocks, (tl.program_id(0) + 1) * HEIGHT // BLOCK + 1)
    for block in range(0, blocks):
        here = _load(k, keys + block * BLOCK, columns, BLOCK, DIM)
        inner, gate, own = _scores(queries, here, rows, block, scale, BLOCK, WIDE, CAUSAL)
        highest = tl.maximum(top, tl.maximum(gate, tl.max(own, 1)))
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        kept_share, gate, own = tl.exp(top - safe), tl.exp(gate - safe), tl.exp(own - safe[:, None])
        total = total * kept_share + gate + tl.sum(own, 1)
        values = _load(v, keys + block * BLOCK, columns, BLOCK, DIM)
        shares = (inner * gate[:, None] + own).to(values.dtype)
        said = said * kept_share[:, None] + tl.dot(shares, values, input_precision="ieee")
        top = highest
    _store(out, head * length, rows, length, said / total[:, None], DIM)
    tl.store(lse + head * length + rows, top + tl.log(total), mask=rows < length)


@triton.jit
def _gradients(
    queries, asked, here, values, said, lse, rows, block, scale,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return (shares, ds) [rows, WIDE]: of values in the result, and of scores in the loss."""
    inner, gate, own = _scores(queries, here, rows, block, scale, BLOCK, WIDE, CAUSAL)
    gate, own = tl.exp(gate - lse), tl.exp(own - lse[:, None])
    reads = tl.dot(asked, tl.trans(values), input_precision="ieee")
    block_reads = tl.sum(inner * reads, 1)
    shares = inner * gate[:, None]
    ds = shares * (reads - block_reads[:, None]) + own * (reads - said[:, None])
    landmark = tl.arange(0, WIDE)[None, :] == BLOCK - 1
    ds = tl.where(landmark, (gate * (block_reads - said))[:, None], ds)
    return shares + own, ds


@triton.jit
def _backward_rows(
    dout, q, k, v, said, lse, dq, scale, length, kept, heads, kv_heads,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, DIM: tl.constexpr, HEIGHT: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    head = tl.program_id(1)
    keys = (head // heads * kv_heads + head % heads // (heads // kv_heads)) * kept
    columns = tl.arange(0, WIDE)
    queries, asked = (
        _load(q, head * length, rows, length, DIM),
        _load(dout, head * length, rows, length, DIM),
    )
    of_rows = head * length + rows
    total = tl.load(lse + of_rows, mask=rows < length, other=float("inf"))
    whole = tl.load(said + of_rows, mask=rows < length, other=0.0)
    gradient = tl.zeros([HEIGHT, DIM], tl.float32)
    blocks = kept // BLOCK
    if CAUSAL:
        blocks = tl.minimum(blocks, (tl.program_id(0) + 1) * HEIGHT // BLOCK + 1)
    for block in range(0, blocks):
        here = _load(k, keys + block * BLOCK, columns, BLOCK, DIM)
        values = _load(v, keys + block * BLOCK, columns, BLOCK, DIM)
        _, ds = _gradients(
            queries, asked, here, values, whole, total, rows, block, scale, BLOCK, WIDE, CAUSAL
        )
        gradient += tl.dot(ds.to(here.dtype), here, input_precision="ieee")
    _store(dq, head * length, rows, length, gradient * scale, DIM)


@triton.jit
def _backward_keys(
    dout, q, k, v, said, lse, dk, dv, scale, length, kept, heads, kv_heads,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, DIM: tl.constexpr, HEIGHT: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    block, key_head = tl.program_id(0), tl.program_id(1)
    group = heads // kv_heads
    keys, columns = key_head * kept + block * BLOCK, tl.arange(0, WIDE)
    here, values = _load(k, keys, columns, BLOCK, DIM), _load(v, keys, columns, BLOCK, DIM)
    of_keys, of_values = tl.zeros([WIDE, DIM], tl.float32), tl.zeros([WIDE, DIM], tl.float32)
    first = 0
    if CAUSAL:
        first = block * BLOCK // HEIGHT
    for member in range(0, group):
        head = key_head // kv_heads * heads + key_head % kv_heads * group + member
        for tile in range(first, tl.cdiv(length, HEIGHT)):
            rows = tile * HEIGHT + tl.arange(0, HEIGHT)
            queries = _load(q, head * length, rows, length, DIM)
            asked = _load(dout, head * length, rows, length, DIM)
            of_rows = head * length + rows
            total = tl.load(lse + of_rows, mask=rows < length, other=float("inf"))
            whole = tl.load(said + of_rows, mask=rows < length, other=0.0)
            shares, ds = _gradients(
                queries, asked, here, values, whole, total, rows, block, scale, BLOCK, WIDE, CAUSAL
            )
            of_values += tl.dot(tl.trans(shares).to(asked.dtype), asked, input_precision="ieee")
            of_keys += tl.dot(tl.trans(ds).to(queries.dtype), queries, input_precision="ieee")
    _store(dk, keys, columns, BLOCK, of_keys * scale, DIM)
    _store(dv, keys, columns, BLOCK, of_values, DIM)
