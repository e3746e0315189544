"""Infini-attention: compressive memory beside attention (Munkhdalai et al. 2024, 2404.07143).

Each key-value head carries a matrix M [K, K] and a norm z [K]. With s(x) = ELU(x) + 1, a query of
segment n reads s(q) M / (s(q) z), both as segment n-1 left them, and a learned gate a head blends
it with the head's attention. Queries and keys have no RoPE here: what is old has no place.

linear: M += s(k)^T v. delta: M += s(k)^T (v - s(k) M / (s(k) z)), with M and z from before the
segment. Linear is a sum over segments; delta is the affine map M -> A M + P with
A = 1 - s(k)^T diag(1 / (s(k) z)) s(k), which composes: (A2, P2) after (A1, P1) is
(A2 A1, A2 P1 + P2). So both are scans, and ranks that hold parts of a segment just add theirs up.

M and z are float32: after a few segments z has outgrown half precision. Until something is written
the memory reads as 0, and the gate is applied all the same.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.config import InfiniMemory, ModelConfig
from model.interfaces import Linears, Segments
from model.layers import starts_at
from model.memory.base import Axes, Block, Initial, Part, PartMemory, Tokens
from model.memory.scan import Item, scan, where_start
from model.precision import sum_dtype


class InfiniState(NamedTuple):
    """A layer's matrices and their norms, float32 or wider."""

    memory: Annotated[Tensor, Axes(heads=1)]  # [B, Hkv, K, K]: key features by value features
    norm: Annotated[Tensor, Axes(heads=1)]  # [B, Hkv, K]


def features(x: Tensor) -> Tensor:
    """Return s(x) = ELU(x) + 1, positive, float32 or wider."""
    return functional.elu(x.to(sum_dtype(x))) + 1


def read_memory(q: Tensor, state: InfiniState) -> Tensor:
    """Return what the compressed past says to each query, float32 or wider.

    q [B, N, S, H, K], not rotated; state [B, N, Hkv, ...]: the heads of a group read one matrix.
    Rows whose norm is 0 (nothing written yet) read as 0. Equation (3) of the paper.
    """
    heads = q.unflatten(3, (state.norm.shape[2], -1))  # [B, N, S, Hkv, group, K]
    asked = features(heads)
    found = torch.einsum("bnshgk,bnhkv->bnshgv", asked, state.memory)
    norm = torch.einsum("bnshgk,bnhk->bnshg", asked, state.norm)
    return (found / norm.clamp(min=TINY).unsqueeze(-1)).flatten(3, 4)


TINY = 1e-12
"""Below every norm that a written memory has."""


class InfiniPart(Part):
    """The matrices of one layer, and the gate of each of its heads."""

    def __init__(self, config: ModelConfig, memory: InfiniMemory, linears: Linears) -> None:
        super().__init__()
        self.rule = memory.rule
        self.gate = starts_at(linears.per_head(config.num_heads), memory.gate_init)
        # Adam moves a parameter by its rate a step: at a model's rate the gates would stay where
        # they are, and decay would pull them back.
        self.gate.lr_scale = memory.gate_lr  # type: ignore[attr-defined]

    def empty(self, block: Block, segments: Segments, like: Tensor) -> InfiniState:
        """Return memories of nothing."""
        wide = sum_dtype(like)
        shape = (segments.batch, block.num_kv_heads, block.head_dim, block.head_dim)
        nothing = torch.zeros(shape, device=like.device, dtype=wide)
        return InfiniState(nothing, nothing[..., 0])

    def open(
        self, block: Block, segments: Segments, n: int, state: InfiniState, initial: Initial
    ) -> tuple[InfiniState, None]:
        """Return the state, emptied where a document starts."""
        return _emptied(segments.starts[:, n], state), None

    def close(
        self,
        block: Block,
        segments: Segments,
        n: int,
        opened: InfiniState,
        rest: None,
        tokens: Tokens,
    ) -> InfiniState:
        """Write one segment by the paper's equations: the slow twin of chain."""
        written = self._written(segments, tokens, slice(n, n + 1))
        memory, norm = opened.memory, opened.norm
        if self.rule == "delta":
            keep = self._keep(segments, written.keys, norm.unsqueeze(1))
            memory = keep[:, 0] @ memory
        return InfiniState(memory + written.values[:, 0], norm + written.norms[:, 0])

    def chain(
        self,
        block: Block,
        segments: Segments,
        tokens: Tokens,
        state: InfiniState,
        initial: Initial,
    ) -> tuple[InfiniState, InfiniState]:
        """Return the memory before each segment and after the last, by scans."""
        starts, everything = segments.starts, slice(None)
        written = self._written(segments, tokens, everything)
        if self.rule == "linear":
            sums = (written.values, written.norms)
            before, after = scan(_add, sums, (state.memory, state.norm), starts)
            return _emptied(starts, InfiniState(*before)), InfiniState(*after)
        norms, norm = scan(_add, (written.norms,), (state.norm,), starts)
        known = where_start(starts, torch.zeros_like(norms[0]), norms[0])
        maps = (self._keep(segments, written.keys, known), written.values)
        # What was carried is a map too: the one that gives it whatever came before.
        carried = (torch.zeros_like(state.memory), state.memory)
        before, after = scan(_compose, maps, carried, starts)
        opened = _emptied(starts, InfiniState(before[1], norms[0]))
        return opened, InfiniState(after[1], norm[0])

    def blend(self, q: Tensor, opened: InfiniState, attended: Tensor) -> Tensor:
        """Return gate * memory + (1 - gate) * attention."""
        gate = torch.sigmoid(self.gate.to(opened.norm.dtype)).unsqueeze(-1)
        read = read_memory(q, opened)
        return (attended + gate * (read - attended)).to(attended.dtype)

    def _written(self, segments: Segments, tokens: Tokens, part: slice) -> _Written:
        """Return what segments add, over all ranks, were the memory empty before them."""
        keys, values = features(tokens.raw.k[:, part]), tokens.raw.v[:, part]
        if segments.weights is not None:
            values = values * _counts(segments, part)
            norms = (keys * _counts(segments, part)).sum(2)
        else:
            norms = keys.sum(2)
        added = torch.einsum("bnshk,bnshv->bnhkv", keys, values.to(keys.dtype))
        both = segments.sequence.total(torch.cat((added, norms.unsqueeze(-1)), -1))
        return _Written(keys, both[..., :-1], both[..., -1])

    def _keep(self, segments: Segments, keys: Tensor, norms: Tensor) -> Tensor:
        """Return the delta rule's A: what is left of M where new keys overwrite it.

        keys [B, N, S, Hkv, K]; norms [B, N, Hkv, K]: z before each segment.
        """
        known = torch.einsum("bnshk,bnhk->bnsh", keys, norms)
        # Where nothing was written there is nothing to overwrite.
        share = torch.where(known > 0, 1 / known.clamp(min=TINY), 0.0)
        lost = torch.einsum("bnshk,bnsh,bnshl->bnhkl", keys, share, keys)
        here = torch.eye(keys.shape[-1], device=keys.device, dtype=keys.dtype)
        return here - segments.sequence.total(lost)


class _Written(NamedTuple):
    keys: Tensor  # s(k) of this rank's tokens [B, N, S, Hkv, K]
    values: Tensor  # s(k)^T v [B, N, Hkv, K, K]
    norms: Tensor  # sum of s(k) [B, N, Hkv, K]


def _counts(segments: Segments, part: slice) -> Tensor:
    """Return how many segments each stands for: [B, N, 1, 1, 1]."""
    assert segments.weights is not None
    return segments.weights[:, part].exp()[..., None, None, None]


def _emptied(starts: Tensor, state: InfiniState) -> InfiniState:
    return InfiniState(*(where_start(starts, torch.zeros_like(x), x) for x in state))


def _add(a: Item, b: Item) -> Item:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _compose(a: Item, b: Item) -> Item:
    """Return the map of a, then b; each (A, P) takes M to A M + P."""
    return b[0] @ a[0], b[0] @ a[1] + b[1]


class Infini(PartMemory):
    """Infini-attention; nothing is shared over the layers."""

    def __init__(self, config: ModelConfig, memory: InfiniMemory) -> None:
        super().__init__()
        self.memory = memory
        # The delta rule's second write of a segment is not its first once more.
        self.weighted = memory.rule == "linear"

    def part(self, config: ModelConfig, linears: Linears) -> Part:
        """Return one layer's matrices."""
        return InfiniPart(config, self.memory, linears)
