"""Block sliding window attention (BSWA), and no memory as the window of width 0.

A token of segment n reads all keys of segments n-M .. n-1 of its document and its own segment up to
itself: a staircase of M*S+1 .. (M+1)*S keys. No stop-gradient (TransformerFAM, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.interfaces import Linears, Segments
from model.memory.base import Block, Mixer
from model.rope import rotate


class WindowState(NamedTuple):
    """The keys and values of the last M segments, before RoPE, and how many are this document's."""

    k: Tensor  # [B, M, S, Hkv, K]
    v: Tensor
    age: Tensor  # [B] int64: segments of the document read so far


class Tokens(NamedTuple):
    """A block's queries, and its keys with those of the past before them."""

    q: Tensor  # [B, N, S, H, K], rotated
    k: Tensor  # [B, M + N, S, Hkv, K], rotated
    v: Tensor  # [B, M + N, S, Hkv, K]
    visible: Tensor | None  # [B, N, M] bool
    state: WindowState


def empty_window(window: int, segments: Segments, block: Block, like: Tensor) -> WindowState:
    """Return the window of streams that have read nothing."""
    shape = (segments.batch, window, segments.length, block.num_kv_heads, block.head_dim)
    nothing = torch.zeros(shape, device=like.device, dtype=like.dtype)
    return WindowState(nothing, nothing, torch.zeros_like(segments.starts[:, 0], dtype=torch.int64))


def read_tokens(
    block: Block, x: Tensor, segments: Segments, state: WindowState, window: int
) -> Tokens:
    """Return queries and keys of x [rows, D], and the window that the next segments will read."""
    shape = (segments.batch, segments.num_segments, segments.length)
    q, k, v = (part.unflatten(0, shape) for part in block.project(x))
    age = document_age(segments.starts, state.age)
    if window:
        k, v = torch.cat((state.k, k), 1), torch.cat((state.v, v), 1)
    cos, sin = segments.cos.unsqueeze(-2), segments.sin.unsqueeze(-2)
    rotated = (rotate(q, cos[window:], sin[window:]), rotate(k, cos, sin))
    after = WindowState(
        k[:, segments.num_segments :], v[:, segments.num_segments :], age[:, -1] + 1
    )
    visible = None
    if window:
        visible = age.unsqueeze(-1) > torch.arange(window, device=age.device)
    return Tokens(*rotated, v, visible, after)


def document_age(starts: Tensor, before: Tensor) -> Tensor:
    """Return how many earlier segments of its document each segment has: [B, N] int64.

    starts [B, N]; before [B]: segments read of the document that was open.
    """
    index = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    first = torch.where(starts, index, -1).cummax(1).values
    return torch.where(first < 0, index + before.unsqueeze(1), index - first)


class WindowMixer(Mixer):
    """Attention over the segment and the M before it."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def mix(
        self, block: Block, x: Tensor, segments: Segments, state: WindowState, initial: None
    ) -> tuple[Tensor, WindowState]:
        """Return the block's output rows and the next window."""
        tokens = read_tokens(block, x, segments, state, self.window)
        attended = segments.sequence.fold(tokens.q, tokens.k, tokens.v, visible=tokens.visible)
        return block.finish(x, attended.flatten(0, 2)), tokens.state

    def empty(self, block: Block, segments: Segments, like: Tensor) -> WindowState:
        """Return an empty window."""
        return empty_window(self.window, segments, block, like)


class Window(nn.Module):
    """`memory: none` and `memory: window`."""

    slots: int = 0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.window = config.window

    def mixer(self) -> Mixer:
        """Return the block's part."""
        return WindowMixer(self.window)

    def initial(self, blocks: Items[Any], linears: Linears) -> list[None]:
        """A document begins with nothing: `visible` hides what came before."""
        return [None] * len(blocks)

    def handed_on(self, states: list[WindowState]) -> None:
        """Nothing: keys of another document are no start."""
        return None
