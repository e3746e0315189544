"""How one block mixes its segments: attention over window, parts and rows; what it carries on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.interfaces import Segments
from model.kernels import Kernel
from model.memory.base import Block, Initial, Opened, Part, State, Tokens
from model.memory.frame import Rows, read_rows, rows_keys, token_pieces
from model.memory.window import WindowState, empty_window, read_tokens
from model.rope import rope_tables, rotate


class MixerState(NamedTuple):
    """What a layer carries: its window, and the state of each of its parts."""

    window: WindowState
    parts: dict[str, State]


class Mixer(nn.Module):
    """The memory of one block. With neither parts nor rows: attention over window and segment."""

    def __init__(
        self, parts: dict[str, Part], rope_base: float, kernel: Kernel | None = None
    ) -> None:
        super().__init__()
        self.parts, self.rope_base = nn.ModuleDict(parts), rope_base
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
        pieces = [
            piece
            for part, read in zip(self._parts().values(), opened, strict=True)
            if (piece := part.piece(segments, read)) is not None
        ]
        others = [
            other
            for part, read in zip(self._parts().values(), opened, strict=True)
            if (other := part.other(segments, read, tokens.raw.q)) is not None
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
            other=others[0] if others else None,
        )
        for part, read in zip(self._parts().values(), opened, strict=True):
            attended = part.blend(tokens.raw.q, read, attended)
        if rows is not None:
            rows = read_rows(block, rows, keys, tokens.segment(0), segments)
        return block.finish(x, attended.flatten(0, 2)), rows, MixerState(window, after)

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

    def empty(self, block: Block, segments: Segments, like: Tensor) -> MixerState:
        """Return the state of streams that have read nothing (`like`: device and type)."""
        parts = {name: part.empty(block, segments, like) for name, part in self._parts().items()}
        return MixerState(empty_window(segments, block, like), parts)

    def alone(self, block: Block, x: Tensor) -> Tensor:
        """Return the block's output for memory rows x [rows, D], which read one another."""
        q, k, v, _ = block.project(x)
        positions = torch.arange(q.shape[0], device=x.device)
        cos, sin = rope_tables(positions, block.head_dim, self.rope_base, x)
        q, k = (rotate(part, cos.unsqueeze(1), sin.unsqueeze(1)) for part in (q, k))
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return block.finish(x, out.squeeze(0).transpose(0, 1))

    def _parts(self) -> dict[str, Part]:
        return {name: part for name, part in self.parts.items() if isinstance(part, Part)}
