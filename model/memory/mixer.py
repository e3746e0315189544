"""How one block mixes its segments: attention over window, parts and rows; what it carries on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention import merge
from model.config import ModelConfig
from model.fold import Piece
from model.interfaces import Segments
from model.kernels import Kernel
from model.memory.base import (
    Block,
    Initial,
    Opened,
    Part,
    Projected,
    State,
    Tokens,
    stack_segments,
)
from model.memory.frame import Rows, read_before, read_rows, rows_keys, token_pieces
from model.memory.window import WindowState, document_age, empty_window, read_tokens
from model.rope import rope_tables, rotate


class MixerState(NamedTuple):
    """What a layer carries: its window, and the state of each of its parts."""

    window: WindowState
    parts: dict[str, State]


class OpenLayer(NamedTuple):
    """A layer while a segment is read token by token."""

    pieces: list[Piece]  # what its tokens read beside themselves
    reads: dict[str, Opened]  # of each part, [B, 1, ...]
    k: Tensor  # [B, tokens so far, Hkv, K], rotated
    v: Tensor
    memory: State  # what else a mixer's own kind reads


class _Read(NamedTuple):
    """What some tokens read of a part."""

    part: Part
    opened: Opened
    tokens: Tensor | None = None  # [B, N, S] bool; None: all

    def hide(self, piece: Piece) -> Piece:
        """Return the part's keys, hidden from other tokens."""
        if self.tokens is None:
            return piece
        visible = self.tokens
        if piece.visible is not None:
            visible = visible & piece.visible.unsqueeze(-1)
        return piece._replace(visible=visible)

    def hide_result(self, other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what was read beside all keys as nothing for other tokens."""
        if self.tokens is None:
            return other
        out, lse = other
        return out, lse.masked_fill(~self.tokens.unsqueeze(2), float("-inf"))

    def blend(self, q: Tensor, attended: Tensor) -> Tensor:
        """Return the attention's result with the part's read in it, for these tokens alone."""
        blended = self.part.blend(q, self.opened, attended)
        if self.tokens is None or blended is attended:
            return blended
        return torch.where(self.tokens[..., None, None], blended, attended)


def _merged(others: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Return results out [B, N, S, H, K], lse [B, N, H, S] over different keys as one."""
    if not others:
        return None
    out, lse = others[0]
    for more, more_lse in others[1:]:
        out, lse = merge((out, lse.transpose(2, 3)), (more, more_lse.transpose(2, 3)))
        lse = lse.transpose(2, 3)
    return out, lse


def _window_pieces(segments: Segments, window: WindowState) -> list[Piece]:
    """Return the keys of the segments before, rotated, hidden where another document's."""
    count = segments.window
    cos, sin = (t[:count].unsqueeze(-2) for t in (segments.cos, segments.sin))
    k, age = rotate(window.k, cos, sin), document_age(segments.starts, window.age)
    return [Piece(k[:, i : i + 1], window.v[:, i : i + 1], age >= count - i) for i in range(count)]


class Mixer(nn.Module):
    """The memory of one block. With neither parts nor rows: attention over window and segment."""

    def __init__(
        self, parts: dict[str, Part], config: ModelConfig, kernel: Kernel | None = None
    ) -> None:
        super().__init__()
        self.parts, self.config = nn.ModuleDict(parts), config
        self.kernel = kernel  # of token keys, where it is not plain softmax

    @property
    def extra(self) -> int:
        """Features that the parts want of each key head's projection."""
        return sum(part.extra for part in self._parts().values())

    def mix(
        self,
        block: Block,
        x: Tensor,
        rows: Rows | None,
        segments: Segments,
        state: MixerState,
        initial: Initial,
    ) -> tuple[Tensor, Rows | None, MixerState]:
        """Return the block's output rows of tokens and of memory, and the state after the last.

        x [rows, D] flat over B, N, S. Only a memory's chain may run over n; all else is one call.
        rows: memory rows beside the tokens of one segment (N = 1).
        """
        tokens, window = read_tokens(block, x, segments, state.window)
        opened, after = self._chains(block, segments, tokens, state.parts, initial)
        reads = self._reads(block, segments, opened, state.parts, initial)
        pieces = [
            read.hide(piece)
            for read in reads
            if (piece := read.part.piece(segments, read.opened)) is not None
        ]
        others = [
            read.hide_result(other)
            for read in reads
            if (other := read.part.other(segments, read.opened, tokens.raw.q)) is not None
        ]
        if rows is not None:
            keys = rows_keys(block, rows, segments)
            pieces += token_pieces(rows, keys, segments)
        attended = segments.sequence.fold(
            tokens.q,
            tokens.k,
            tokens.v,
            pieces=pieces,
            visible=tokens.visible,
            kernel=self.kernel,
            other=_merged(others),
            packed=segments.packed,
        )
        for read in reads:
            attended = read.blend(tokens.raw.q, attended)
        if rows is not None:
            rows = read_rows(block, rows, keys, tokens.segment(0), segments)
        return block.finish(x, attended.flatten(0, 2)), rows, MixerState(window, after)

    def remember(
        self, block: Block, x: Tensor, segments: Segments, state: MixerState, initial: Initial
    ) -> MixerState:
        """Return the state that mix returns, without what its tokens read: x [rows, D]."""
        tokens, window = read_tokens(block, x, segments, state.window)
        _, after = self._chains(block, segments, tokens, state.parts, initial)
        return MixerState(window, after)

    def open(
        self,
        block: Block,
        rows: Rows | None,
        segments: Segments,
        state: MixerState,
        initial: Initial,
    ) -> tuple[Rows | None, OpenLayer]:
        """Return what tokens of the next segment read, none of them known yet.

        segments: of that one (N = 1). rows: those that stand before its tokens.
        """
        reads, pieces = {}, _window_pieces(segments, state.window)
        for name, part in self._parts().items():
            opened, _ = part.open(block, segments, 0, state.parts[name], initial[name])
            reads[name] = stack_segments([opened])
            piece = part.piece(segments, reads[name])
            pieces += [piece] if piece is not None else []
        like = state.window.k[:, :0].flatten(1, 2)  # [B, 0, Hkv, K]
        layer = OpenLayer(pieces, reads, like, like, None)
        return (None, layer) if rows is None else self.join(block, rows, segments, layer)

    def join(
        self, block: Block, rows: Rows, segments: Segments, layer: OpenLayer
    ) -> tuple[Rows, OpenLayer]:
        """Return rows that stand before the tokens after this layer; later tokens read them."""
        keys = rows_keys(block, rows, segments)
        attended = read_before(rows.frame, keys).flatten(0, 1)
        # Late rows come when the middle is reached: what is read from now on reads them.
        pieces = [
            piece._replace(queries=slice(None)) for piece in token_pieces(rows, keys, segments)
        ]
        after = rows._replace(x=block.finish(rows.x, attended))
        return after, layer._replace(pieces=layer.pieces + pieces)

    def extend(
        self, block: Block, x: Tensor, segments: Segments, layer: OpenLayer
    ) -> tuple[Tensor, OpenLayer]:
        """Return the block's output rows of the segment's next tokens: x [B * c, D]."""
        assert self.kernel is None, "blocks of keys are read whole: see stream.Recomputed"
        first = layer.k.shape[1]
        raw = Projected(*(part.unflatten(0, (segments.batch, 1, -1)) for part in block.project(x)))
        here = slice(first, first + raw.q.shape[2])
        cos, sin = (t[segments.window, here].unsqueeze(-2) for t in (segments.cos, segments.sin))
        q, k = rotate(raw.q, cos, sin), rotate(raw.k, cos, sin)
        pieces = list(layer.pieces)
        if first:
            pieces.append(Piece(layer.k.unsqueeze(1), layer.v.unsqueeze(1)))
        attended = segments.sequence.fold(q, k, raw.v, pieces=pieces)
        for name, part in self._parts().items():
            attended = part.blend(raw.q, layer.reads[name], attended)
        layer = layer._replace(
            k=torch.cat((layer.k, k[:, 0]), 1), v=torch.cat((layer.v, raw.v[:, 0]), 1)
        )
        return block.finish(x, attended.flatten(0, 2)), layer

    def _chains(
        self,
        block: Block,
        segments: Segments,
        tokens: Tokens,
        states: dict[str, State],
        initial: dict[str, Initial],
    ) -> tuple[list[Opened], dict[str, State]]:
        opened, after, first = [], {}, 0
        for name, part in self._parts().items():
            wanted = slice(first, first + part.extra)
            first += part.extra
            raw = tokens.raw._replace(extra=tokens.raw.extra[..., wanted])
            read, after[name] = part.chain(
                block, segments, tokens._replace(raw=raw), states[name], initial[name]
            )
            opened.append(read)
        return opened, after

    def _reads(
        self,
        block: Block,
        segments: Segments,
        opened: list[Opened],
        states: dict[str, State],
        initial: dict[str, Initial],
    ) -> list[_Read]:
        """Return what tokens read of each part; in packed segments, what each document's do.

        The first document of a segment reads what was carried, the others the start of one. (The
        start is made even where no segment holds another: all ranks must call the same layers.)
        """
        parts = self._parts()
        if segments.packed is None:
            return [_Read(part, of) for part, of in zip(parts.values(), opened, strict=True)]
        found, first = [], segments.packed.first
        for (name, part), carried in zip(parts.items(), opened, strict=True):
            begun = part.begin(block, segments, states[name], initial[name])
            found += [_Read(part, carried, first), _Read(part, begun, ~first)]
        return found

    def empty(self, block: Block, segments: Segments, like: Tensor) -> MixerState:
        """Return the state of streams that have read nothing (`like`: device and type)."""
        parts = {name: part.empty(block, segments, like) for name, part in self._parts().items()}
        return MixerState(empty_window(segments, block, like), parts)

    def alone(self, block: Block, x: Tensor) -> Tensor:
        """Return the block's output for memory rows x [rows, D], which read one another."""
        q, k, v, _ = block.project(x)
        positions = torch.arange(q.shape[0], device=x.device)
        config = self.config
        cos, sin = rope_tables(positions, config.head_dim, config.rope_base, x, config.rope_scaling)
        q, k = (rotate(part, cos.unsqueeze(1), sin.unsqueeze(1)) for part in (q, k))
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return block.finish(x, out.squeeze(0).transpose(0, 1))

    def _parts(self) -> dict[str, Part]:
        return {name: part for name, part in self.parts.items() if isinstance(part, Part)}


class LocalMixer(Mixer):
    """Attention inside the segment alone, in a model whose other layers look further back."""

    def mix(
        self,
        block: Block,
        x: Tensor,
        rows: Rows | None,
        segments: Segments,
        state: MixerState,
        initial: Initial,
    ) -> tuple[Tensor, Rows | None, MixerState]:
        """Return what a mixer without a window does."""
        return super().mix(block, x, rows, _without_window(segments), state, initial)

    def open(
        self,
        block: Block,
        rows: Rows | None,
        segments: Segments,
        state: MixerState,
        initial: Initial,
    ) -> tuple[Rows | None, OpenLayer]:
        """Return what a mixer without a window does."""
        return super().open(block, rows, _without_window(segments), state, initial)

    def empty(self, block: Block, segments: Segments, like: Tensor) -> MixerState:
        """Return the state of streams that have read nothing: there is none but their age."""
        return super().empty(block, _without_window(segments), like)


def _without_window(segments: Segments) -> Segments:
    """Return the segments as layers see them that read no earlier one; places stay the same."""
    own = slice(segments.window, None)
    return segments._replace(window=0, cos=segments.cos[own], sin=segments.sin[own])
