"""Recurrent Memory Transformer (Bulatov et al. 2022, 2207.06881): rows from the top to the bottom.

m memory rows stand before a segment, and the same rows again behind it. Tokens read those before;
those behind read everything, and what they are after the last layer and the final norm is the
memory of the next segment.

The gradient goes back as far as the training loop lets it: with train.bptt_len of D + 1 segments
the loss in a segment reaches at most D segments back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ModelConfig, RmtMemory
from model.interfaces import Segments
from model.memory.carry import Carry
from model.memory.frame import Frame, Rows
from model.memory.in_turn import InTurn, Stack
from model.memory.scan import where_start
from model.precision import sum_dtype


class RmtState(NamedTuple):
    """The memory that the last segment left."""

    memory: Tensor  # [B, m, D], float32 or wider


class Rmt(InTurn):
    """The rows a document begins with, and what is carried of those a segment leaves."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        memory = config.memory
        assert isinstance(memory, RmtMemory)
        self.slots, self.hidden_size = memory.slots, config.hidden_size
        self.frame = Frame(front=memory.slots, back=memory.slots, causal=memory.mask == "causal")
        self.initial_memory = nn.Parameter(torch.empty(memory.slots, config.hidden_size))
        # Without it the rows behind begin as those before: only their places tell them apart.
        self.offset = (
            nn.Parameter(torch.empty(memory.slots, config.hidden_size)) if memory.offset else None
        )
        self.carry = Carry(config.hidden_size, config.norm_eps, memory.state, memory.beta)

    def empty(self, batch: int, like: Tensor) -> RmtState:
        """Return a memory that holds nothing yet: a document's start puts the first rows there."""
        wide = sum_dtype(like)
        shape = (batch, self.slots, self.hidden_size)
        return RmtState(torch.zeros(shape, device=like.device, dtype=wide))

    def open(
        self, stack: Stack, segments: Segments, state: RmtState, prepared: None
    ) -> tuple[Rows, None]:
        """Return the memory before the segment and behind it."""
        begin = self.initial_memory.to(state.memory.dtype)
        memory = where_start(segments.starts[:, 0], begin, state.memory)
        behind = memory if self.offset is None else memory + self.offset
        x = torch.cat((memory, behind), 1).flatten(0, 1)
        return Rows(self.frame, stack.linears.scatter(x)), None

    def close(self, stack: Stack, segments: Segments, rows: Rows, rest: None) -> RmtState:
        """Return the rows behind, after the final norm."""
        wide = sum_dtype(rows.x)
        left = stack.linears.gather(self.carry(stack.normed(rows.x).to(wide)))
        return RmtState(left.unflatten(0, (segments.batch, -1))[:, self.slots :])
