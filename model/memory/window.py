"""Block sliding window attention (BSWA), and no memory as the window of width 0.

A token of segment n reads all keys of segments n-M .. n-1 of its document and its own segment up to
itself: a staircase of M*S+1 .. (M+1)*S keys. No stop-gradient (TransformerFAM, section 2).
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from model.interfaces import Segments
from model.memory.base import Axes, Block, Projected, Tokens
from model.rope import rotate


class WindowState(NamedTuple):
    """The keys and values of the last M segments, before RoPE, and how many are this document's."""

    k: Annotated[Tensor, Axes(heads=3, tokens=2)]  # [B, M, S, Hkv, K]
    v: Annotated[Tensor, Axes(heads=3, tokens=2)]
    age: Tensor  # [B] int64: segments of the document read so far


def empty_window(segments: Segments, block: Block, like: Tensor) -> WindowState:
    """Return the window of streams that have read nothing."""
    shape = (segments.batch, segments.window, segments.length, block.num_kv_heads, block.head_dim)
    nothing = torch.zeros(shape, device=like.device, dtype=like.dtype)
    return WindowState(nothing, nothing, torch.zeros_like(segments.starts[:, 0], dtype=torch.int64))


def read_tokens(
    block: Block, x: Tensor, segments: Segments, state: WindowState
) -> tuple[Tokens, WindowState]:
    """Return queries and keys of x [rows, D], and the window that the next segments will read."""
    shape, window = (segments.batch, segments.num_segments, segments.length), segments.window
    raw = Projected(*(part.unflatten(0, shape) for part in block.project(x)))
    k, v = raw.k, raw.v
    age = document_age(segments.starts, state.age)
    if window:
        k, v = torch.cat((state.k, k), 1), torch.cat((state.v, v), 1)
    cos, sin = segments.cos.unsqueeze(-2), segments.sin.unsqueeze(-2)
    rotated = rotate(k, cos, sin)
    here = (x.narrow(-4, window, segments.num_segments) for x in (cos, sin))  # B may stand before
    q = rotate(raw.q, *here)
    # Copies: views would keep the keys of all N segments alive, in every layer, until the backward.
    last_k, last_v = (x[:, segments.num_segments :].clone() for x in (k, v))
    after = WindowState(last_k, last_v, age[:, -1] + 1)
    visible = None
    if window:
        visible = age.unsqueeze(-1) > torch.arange(window, device=age.device)
    return Tokens(q, rotated, v, visible, raw, k, age), after


def document_age(starts: Tensor, before: Tensor) -> Tensor:
    """Return how many earlier segments of its document each segment has: [B, N] int64.

    starts [B, N]; before [B]: segments read of the document that was open.
    """
    index = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    first = torch.where(starts, index, -1).cummax(1).values
    return torch.where(first < 0, index + before.unsqueeze(1), index - first)
