"""Grouped softmax, the attention of Landmark Attention, as a piece of a fold.

Keys come in blocks; the last position of a block is its landmark. A query reads its own block token
by token and every earlier block through one gate: the landmark's score is what the block adds to
the row's log-sum-exp, and a softmax over the block's regular tokens alone is what it says. So a
past block is one key whose score is the landmark's and whose value is `sum_j r_j v_j`, and pieces
join by attention.merge as those of plain attention do.
Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.precision import sum_dtype

_ROWS = 256
"""Query rows at a time, as model.kernels.Blockwise; a block longer than that is one step."""

_SCORES = 2**26
"""Scores held at once where batch and heads are many: 256 MiB in float32. Fewer rows then."""


class GroupedSoftmax:
    """A model.kernels.Kernel over blocks of `block` positions, landmark last: any device and type.

    causal=True: queries and keys are the same positions. A query reads its own block up to itself
    (the landmark's own key is hidden, from the landmark too) and the gates of the blocks before it.
    causal=False: every block of the piece is a past one. The keys' length is a multiple of `block`.
    Landmarks' values are never read. Computed in float32, or float64 where the inputs are.
    """

    def __init__(self, block: int) -> None:
        assert block >= 2, f"a block of {block} positions has no regular token"
        self.block = block

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return (out, lse): out of q's shape and type, lse [B, H, Sq] in float32 or float64."""
        outs, lses = [], []
        for step in _steps(q, k, v, self.block, causal):
            within, gates, own = step.scores(step.fold(q) * q.shape[-1] ** -0.5)
            lse = torch.cat((gates, own), -1).logsumexp(-1, keepdim=True)
            shares = within.mul_(torch.exp(gates - lse).unsqueeze(-1)).flatten(-2)
            out = shares @ step.past(step.v)
            if causal:
                out += step.times_own(torch.exp(own - lse), step.v)
            outs.append(step.unfold(out).to(q.dtype))
            lses.append(step.unfold(lse).squeeze(-1))
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
        """Return dq, dk, dv of this piece, given the fold's final out and lse."""
        said = (dout.to(lse.dtype) * out).sum(-1)
        return self.backward_of_both(dout, q, k, v, said, lse, causal)

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
        """Return dq, dk, dv where lse has a gradient dlse as well.

        said [B, H, Sq] is <dout, out> - dlse: a score of share p in its row, with a value of its
        own, has the gradient p * (<dout, value> - said).
        """
        scale = q.shape[-1] ** -0.5
        dqs, dk, dv = [], torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
        for step in _steps(q, k, v, self.block, causal):
            rows, d = step.fold(q) * scale, step.fold(dout)
            total, whole = step.fold(lse.unsqueeze(-1)), step.fold(said.unsqueeze(-1))
            within, gates, own = step.scores(rows)
            p = torch.exp(gates - total)
            reads = (d @ step.past(step.v).mT).view_as(within)
            block_reads = (within * reads).sum(-1)
            shares = within.mul_(p.unsqueeze(-1))
            ds = reads.sub_(block_reads.unsqueeze(-1)).mul_(shares)
            ds[..., -1] = p * (block_reads - whole)
            shares, ds = shares.flatten(-2), ds.flatten(-2)
            step.past(dv).add_(shares.mT @ d)
            step.past(dk).add_(ds.mT @ rows)
            dq = ds @ step.past(step.k)
            if causal:
                own = torch.exp(own - total)
                step.add_own(dv, own, d)
                own *= step.against_own(d, step.v) - whole
                step.add_own(dk, own, rows)
                dq += step.times_own(own, step.k)
            dqs.append(step.unfold(dq * scale).to(q.dtype))
        return torch.cat(dqs, 2), dk.to(k.dtype), dv.to(v.dtype)


def _steps(q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool) -> Iterator[_Step]:
    batch, heads, length, _ = q.shape
    kept = k.shape[2]
    assert kept % block == 0, f"{kept} keys are no whole blocks of {block}"
    assert not causal or length == kept, (length, kept)
    wide = sum_dtype(q)
    k, v = k.to(wide).contiguous(), v.to(wide).contiguous()
    rows = max(1, min(_ROWS, _SCORES // (batch * heads * kept)))
    if causal:
        rows = max(rows // block, 1) * block
    for start in range(0, length, rows):
        yield _Step(k, v, start, min(start + rows, length), block, causal, heads)


class _Step:
    """Some query rows, whole blocks of them if causal, and the keys of the blocks they gate.

    Folded rows are [B, Hkv, R, K]. The query heads of one key head lie beside each other, so keys
    are not expanded; causal rows go block by block, so R = blocks * heads * block.
    """

    def __init__(
        self, k: Tensor, v: Tensor, start: int, stop: int, block: int, causal: bool, heads: int
    ) -> None:
        self.k, self.v, self.block, self.causal = k, v, block, causal
        self.rows, self.heads = slice(start, stop), heads
        # The last block of causal rows is nobody's past here.
        self.num_past = (stop - block if causal else k.shape[2]) // block
        self.before = start // block  # blocks that all causal rows gate
        self.width = block if causal else stop - start

    def fold(self, x: Tensor) -> Tensor:
        """[B, H, Sq, K] -> these rows, [B, Hkv, R, K], in the type of the keys."""
        x = x[:, :, self.rows].to(self.k.dtype)
        by_head = x.unflatten(2, (-1, self.width)).unflatten(1, (self.k.shape[1], -1))
        result: Tensor = by_head.transpose(2, 3).flatten(2, 4)
        return result

    def unfold(self, x: Tensor) -> Tensor:
        """[B, Hkv, R, K] -> [B, H, rows, K]; the inverse of fold."""
        by_block = x.unflatten(2, (-1, self.heads // self.k.shape[1], self.width))
        result: Tensor = by_block.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return result

    def past(self, x: Tensor) -> Tensor:
        """[B, Hkv, Sk, K] -> the keys that are gated: a view."""
        return x[:, :, : self.num_past * self.block]

    def scores(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the softmax inside each past block, the gates, and scores of the own block.

        [B, Hkv, R, past blocks, block], 0 for landmarks; [B, Hkv, R, past blocks]; and
        [B, Hkv, R, block], or 0 columns for past pieces. -inf where a row must not look.
        """
        scores = (q @ self.past(self.k).mT).unflatten(-1, (self.num_past, self.block))
        gates = scores[..., -1].clone()
        scores[..., -1] = float("-inf")
        within = scores.softmax(-1)
        if not self.causal:
            return within, gates, gates[..., :0]
        column = torch.arange(self.block, device=q.device)
        ahead = (column > column.unsqueeze(-1)) | (column == self.block - 1)
        own = self.against_own(q, self.k).unflatten(2, (-1, self.block))
        own = own.masked_fill_(ahead, float("-inf")).flatten(2, 3)
        number = torch.arange(self.num_past, device=q.device)
        row_block = self.before + torch.arange(self.num_past - self.before + 1, device=q.device)
        later = (number >= row_block.unsqueeze(-1)).unsqueeze(1)
        by_block = gates.unflatten(2, (len(row_block), -1))
        return within, by_block.masked_fill_(later, float("-inf")).flatten(2, 3), own

    def _own(self, x: Tensor) -> Tensor:
        """[B, Hkv, Sk, K] -> keys of the rows' own blocks, [B, Hkv, blocks, block, K]: a view."""
        result: Tensor = x[:, :, self.rows].unflatten(2, (-1, self.block))
        return result

    def _by_block(self, x: Tensor) -> Tensor:
        """[B, Hkv, R, ...] -> [B, Hkv, blocks, R / blocks, ...]."""
        result: Tensor = x.unflatten(2, (self.num_past - self.before + 1, -1))
        return result

    def against_own(self, x: Tensor, keys: Tensor) -> Tensor:
        """Return x [B, Hkv, R, K] times each key of the row's own block: [B, Hkv, R, block]."""
        return (self._by_block(x) @ self._own(keys).mT).flatten(2, 3)

    def times_own(self, p: Tensor, keys: Tensor) -> Tensor:
        """Return the rows' sums of own keys: p [B, Hkv, R, block] -> [B, Hkv, R, K]."""
        return (self._by_block(p) @ self._own(keys)).flatten(2, 3)

    def add_own(self, gradient: Tensor, p: Tensor, x: Tensor) -> None:
        """Add to each own key the rows x [B, Hkv, R, K] that read it, times p."""
        self._own(gradient).add_(self._by_block(p).mT @ self._by_block(x))
