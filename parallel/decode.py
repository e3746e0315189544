"""Decoding over keys that lie on many ranks, or on many workers of one device, by `merge`.

Sharded keys: each rank attends to its share, and the ranks' (out, lse) are merged: one message of
H * (K + 1) numbers a token and layer, however long the past is. So `longhaul generate` decodes on
several ranks (train.generation.sharded).

Lean partition (Sanovar et al. 2024, LeanAttention): contexts of any lengths are cut into tiles, all
tiles stand in one line, and each worker takes an equal stretch of it, across the ends of contexts.
What a worker finds is partial wherever a context goes on past its stretch; `merge` is associative,
so the parts join in any grouping, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import Exchange, merge
from model.kernels import choose_kernel
from model.precision import sum_dtype


class ShardedKeys(NamedTuple):
    """One layer's keys and values of the tokens read so far, this rank's share; never mutated.

    Which tokens lie where does not matter: keys are rotated, and a decoding query reads them all.
    Those of the prompt and those appended lie apart, so that a new token does not copy the prompt.
    """

    k: Tensor  # [B, this rank's tokens of the prompt, Hkv, K], rotated
    v: Tensor
    new_k: Tensor  # [B, this rank's tokens behind the prompt, Hkv, K], rotated
    new_v: Tensor
    num_tokens: int  # over all ranks
    exchange: Exchange

    @property
    def num_held(self) -> int:
        """Tokens whose keys this rank holds."""
        return self.k.shape[1] + self.new_k.shape[1]

    def append(self, k: Tensor, v: Tensor) -> ShardedKeys:
        """Return the keys with those of new tokens, k and v [B, T, Hkv, K], given on every rank.

        The t-th token of all is kept by rank t mod size, so shares grow alike. Only what was
        appended before is copied.
        """
        size = self.exchange.size
        mine = slice((self.exchange.rank - self.num_tokens) % size, None, size)
        return self._replace(
            new_k=torch.cat((self.new_k, k[:, mine]), 1),
            new_v=torch.cat((self.new_v, v[:, mine]), 1),
            num_tokens=self.num_tokens + k.shape[1],
        )


def shard(k: Tensor, v: Tensor, exchange: Exchange) -> ShardedKeys:
    """Return the keys of which this rank holds k, v [B, any number, Hkv, K], rotated.

    Every rank of the exchange calls this together.
    """
    counts = torch.tensor([k.shape[1]], dtype=torch.float64, device=k.device)
    nothing = k[:, :0]
    return ShardedKeys(k, v, nothing, nothing, int(exchange.sum(counts)), exchange)


def attend(q: Tensor, cache: ShardedKeys) -> Tensor:
    """Return attention [B, S, H, K] of q [B, S, H, K] over all ranks' keys, in q's type.

    q is the same on every rank, and so is the result. Every query reads every key: append a token's
    own key before its query asks. Every rank of the exchange calls this together. Raises ValueError
    without keys.
    """
    if not cache.num_tokens:
        raise ValueError("no rank holds a key; append the first token before its query asks")
    prompt = _attend_here(q, cache.k, cache.v)
    behind = _attend_here(q, cache.new_k, cache.new_v)
    out, lse = cache.exchange.combine(*merge(prompt, behind))
    return out.to(q.dtype).transpose(1, 2)


def _attend_here(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out [B, H, S, K], lse [B, H, S]), float32 or wider, over keys that may be none."""
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    if keys.shape[2]:
        out, lse = choose_kernel(q).forward(queries, keys, values, False)
        return out.to(lse.dtype), lse
    wide = sum_dtype(q)
    lse = torch.full(queries.shape[:3], float("-inf"), dtype=wide, device=q.device)
    return torch.zeros_like(queries, dtype=wide), lse


def lean_partition(lengths: Items[int], tile: int, workers: int) -> list[range]:
    """Return each worker's tiles: stretches of one line of all contexts' tiles, equal within one.

    lengths: keys of each context (a stream's key head); tile: keys of a tile, the last one of a
    context may hold fewer. Tiles are numbered context after context; see `tiles_of`.
    Raises ValueError for a negative length, or fewer than one worker or key a tile.
    """
    if tile < 1 or workers < 1:
        raise ValueError(f"tile={tile} and workers={workers} must both be at least 1")
    if min(lengths, default=0) < 0:
        raise ValueError(f"a context of {min(lengths)} keys; lengths start at 0")
    count = sum(-(-length // tile) for length in lengths)
    ends = [count * worker // workers for worker in range(workers + 1)]
    return [range(*pair) for pair in zip(ends[:-1], ends[1:], strict=True)]


class Tile(NamedTuple):
    """Some keys of one context."""

    context: int
    first: int  # key of the context
    end: int


def tiles_of(lengths: Items[int], tile: int) -> list[Tile]:
    """Return all tiles in the order that `lean_partition` numbers them."""
    return [
        Tile(context, first, min(first + tile, length))
        for context, length in enumerate(lengths)
        for first in range(0, length, tile)
    ]


def lean_attend(
    q: Tensor, keys: Items[Tensor], values: Items[Tensor], *, tile: int, workers: int
) -> tuple[Tensor, Tensor]:
    """Return (out [C, G, K], lse [C, G]) of C contexts' queries, worker by worker: the reference.

    q [C, G, K]: the G query heads that share context c's keys; keys, values: C of [length, K].
    out and lse are float32 or wider; a context without keys has out 0 and lse -inf.
    """
    lengths = [len(k) for k in keys]
    tiles = tiles_of(lengths, tile)
    wide = sum_dtype(q)
    out = torch.zeros_like(q, dtype=wide)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=wide, device=q.device)
    for stretch in lean_partition(lengths, tile, workers):
        for context, part in _walk(q.to(wide), keys, values, tiles[stretch.start : stretch.stop]):
            out[context], lse[context] = merge((out[context], lse[context]), part)
    return out, lse


def _walk(
    q: Tensor, keys: Items[Tensor], values: Items[Tensor], tiles: Items[Tile]
) -> list[tuple[int, tuple[Tensor, Tensor]]]:
    """Return what one worker finds: for each context it meets, (out [G, K], lse [G])."""
    found: list[tuple[int, tuple[Tensor, Tensor]]] = []
    for context, first, end in tiles:
        scores = q[context] @ keys[context][first:end].to(q).t() / math.sqrt(q.shape[-1])
        part = (scores.softmax(-1) @ values[context][first:end].to(q), scores.logsumexp(-1))
        if found and found[-1][0] == context:
            part = merge(found.pop()[1], part)
        found.append((context, part))
    return found
