"""Slots that are running means of past keys and values: constant memory of everything read.

At each token t a slot i has a score s_ti; it holds the softmax-weighted mean of all keys and values
of past segments, kept as (out, lse), so that segments, ranks and streams join by the same `merge`
as attention does. Tokens read slots as keys beside those of their segment, in one softmax.

Keys are written without RoPE, and read as if they stood at the end of the segment before.

Two ways to score: `abc`, a linear map of the token (Peng et al. 2022, 2110.02488, ABC_MLP in its
logcumsumexp form); `cmab`, learned latents that attend the keys (Feng et al. 2023, 2306.12599):
queries that depend on no past, so the whole past is one softmax, updated in O(1).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from model.attention import merge
from model.config import AbcMemory, CmabMemory, ModelConfig
from model.fold import Piece
from model.interfaces import Linears, Segments
from model.memory.base import Axes, Block, Initial, Part, PartMemory, Projected, Tokens
from model.memory.scan import Item, scan, where_start
from model.precision import sum_dtype
from model.rope import rotate


class SlotState(NamedTuple):
    """Running means of a layer, float32 or wider."""

    means: Annotated[Tensor, Axes(heads=1)]  # [B, Hkv, m, 2 K]: of keys and values
    lse: Annotated[Tensor, Axes(heads=1)]  # [B, Hkv, m]: log of their weight; -inf: nothing written


class SlotPart(Part):
    """Slots of one layer."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots

    @abstractmethod
    def scores(self, raw: Projected) -> Tensor:
        """Return log weights of each token for each slot: [B, N, S, Hkv, m], float32 or wider."""

    def empty(self, block: Block, segments: Segments, like: Tensor) -> SlotState:
        """Return slots of weight 0."""
        wide = sum_dtype(like)
        shape = (segments.batch, block.num_kv_heads, self.slots, 2 * block.head_dim)
        means = torch.zeros(shape, device=like.device, dtype=wide)
        return SlotState(means, torch.full_like(means[..., 0], float("-inf")))

    def open(
        self, block: Block, segments: Segments, n: int, state: SlotState, initial: Initial
    ) -> tuple[SlotState, None]:
        """Return the slots, emptied where a document starts."""
        return _emptied(segments.starts[:, n], state), None

    def close(
        self,
        block: Block,
        segments: Segments,
        n: int,
        opened: SlotState,
        rest: None,
        tokens: Tokens,
    ) -> SlotState:
        """Merge one segment in."""
        here = slice(n, n + 1)
        raw = Projected(*(x[:, here] for x in tokens.raw))
        means, lse = self._written(segments, raw, here)
        return SlotState(*_merge(opened, (means[:, 0], lse[:, 0])))

    def chain(
        self,
        block: Block,
        segments: Segments,
        tokens: Tokens,
        state: SlotState,
        initial: Initial,
    ) -> tuple[SlotState, SlotState]:
        """Merge all segments in at once."""
        written = self._written(segments, tokens.raw, slice(None))
        before, after = scan(_merge, written, state, segments.starts)
        return _emptied(segments.starts, SlotState(*before)), SlotState(*after)

    def piece(self, segments: Segments, opened: SlotState) -> Piece:
        """Return the means as keys [B, N, m, Hkv, K], hidden where nothing was written."""
        device = opened.means.device
        ends = torch.arange(opened.means.shape[1], device=device) + segments.window
        cos, sin = segments.rope(ends * segments.segment_len - 1)  # [N, K / 2]
        k, v = opened.means.transpose(2, 3).chunk(2, -1)
        k = rotate(k, cos[:, None, None], sin[:, None, None])
        return Piece(k, v, (opened.lse > float("-inf")).all(-1).all(-1))

    def _written(self, segments: Segments, raw: Projected, part: slice) -> tuple[Tensor, Tensor]:
        """Return (means, lse) of each segment alone, over all ranks: [B, N, Hkv, m, ...]."""
        scores = self.scores(raw).permute(0, 1, 3, 4, 2)  # [B, N, Hkv, m, S]
        if segments.weights is not None:
            scores = scores + segments.weights[:, part, None, None, None]
        lse = scores.logsumexp(-1)
        values = torch.cat((raw.k, raw.v), -1).to(scores.dtype)
        means = torch.exp(scores - lse.unsqueeze(-1)) @ values.transpose(2, 3)
        return segments.sequence.combine(means, lse)


def _merge(a: Item, b: Item) -> Item:
    return merge((a[0], a[1]), (b[0], b[1]))


def _emptied(starts: Tensor, state: SlotState) -> SlotState:
    nothing = torch.full_like(state.lse, float("-inf"))
    return SlotState(
        where_start(starts, torch.zeros_like(state.means), state.means),
        where_start(starts, nothing, state.lse),
    )


class AbcPart(SlotPart):
    """Scores by a linear map of the token, one row of the layer's projection a slot."""

    limit = 32.0  # of a score, either way: exp of a sum of segments stays a float32

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.extra = slots

    def scores(self, raw: Projected) -> Tensor:
        """Return the map's output, bounded."""
        wide = sum_dtype(raw.extra)
        return raw.extra.to(wide).clamp(-self.limit, self.limit)


class CmabPart(SlotPart):
    """Scores by learned latents, asking the keys of their head."""

    def __init__(self, config: ModelConfig, latents: int, linears: Linears) -> None:
        super().__init__(latents)
        self.latents = linears.per_head(config.num_kv_heads, latents, config.head_dim)

    def scores(self, raw: Projected) -> Tensor:
        """Return latents * keys / sqrt(K)."""
        wide = sum_dtype(raw.k)
        scale = raw.k.shape[-1] ** -0.5
        keys = raw.k.to(wide) * scale
        scores: Tensor = torch.einsum("bnshk,hmk->bnshm", keys, self.latents.to(wide))
        return scores


class Abc(PartMemory):
    """Bounded-memory control; nothing is shared over the layers."""

    weighted = True

    def __init__(self, config: ModelConfig, memory: AbcMemory) -> None:
        super().__init__()
        self.memory = memory

    def part(self, config: ModelConfig, linears: Linears) -> Part:
        """Return one layer's slots."""
        return AbcPart(self.memory.slots)


class Cmab(PartMemory):
    """Constant memory of learned latents; nothing is shared over the layers."""

    weighted = True

    def __init__(self, config: ModelConfig, memory: CmabMemory) -> None:
        super().__init__()
        self.memory = memory

    def part(self, config: ModelConfig, linears: Linears) -> Part:
        """Return one layer's latents."""
        return CmabPart(config, self.memory.latents, linears)
