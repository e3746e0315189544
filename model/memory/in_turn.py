"""Memories that hand rows from segment to segment through the whole stack."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol

from torch import Tensor, nn

from model.config import ModelConfig
from model.interfaces import Linears, Segments
from model.memory.base import Carried, Initial, State
from model.memory.frame import Rows
from model.memory.mixer import Mixer


class Stack(Protocol):
    """What such a memory uses of the decoder."""

    linears: Linears

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [rows, D] of tokens of any shape, scattered."""
        ...

    def normed(self, rows: Tensor) -> Tensor:
        """Return rows [rows, D] after the stack's final norm."""
        ...

    def through(
        self, x: Tensor, rows: Rows | None, segments: Segments, layers: list[State] | None
    ) -> tuple[Tensor, Rows | None, list[State]]:
        """Return rows of tokens and of memory after all blocks; layers None: nothing carried."""
        ...


class InTurn(nn.Module):
    """A memory of the whole stack: rows stand around a segment's tokens, and become its state."""

    in_turn = True
    weighted = False
    packs = False  # a document that begins inside a segment would need rows of its own
    wavefront = False  # what it carries lies in the layers alone; see model.wavefront

    def mixer(self, config: ModelConfig, linears: Linears, layer: int) -> Mixer:
        """Return the memory of one block: the rows come from outside, so nothing but a window."""
        return Mixer({}, config)

    @abstractmethod
    def empty(self, batch: int, like: Tensor) -> State:
        """Return the state of streams that have read nothing (`like`: device and type)."""

    def prepare(
        self, stack: Stack, tokens: Tensor, segments: Segments, step: int | None
    ) -> list[Any]:
        """Return what each of the N segments needs that depends on no other, in one call.

        tokens [B, N, S]; step: of training, None after it.
        """
        return [None] * tokens.shape[1]

    def unknown(self) -> Any:
        """Return what prepare gives for a segment whose tokens are not known yet."""
        return None

    @abstractmethod
    def open(
        self, stack: Stack, segments: Segments, state: State, prepared: Any
    ) -> tuple[Rows, Any]:
        """Return the rows of the one segment, and what `close` needs.

        The state is what the segment before left: where this one starts a document, it is reset.
        """

    def halfway(self, stack: Stack, segments: Segments, tokens: Tensor, rest: Any) -> Rows | None:
        """Return rows that join when a segment's first half is known, where it is read in parts.

        tokens [B, S / 2].
        """
        return None

    @abstractmethod
    def close(self, stack: Stack, segments: Segments, rows: Rows, rest: Any) -> State:
        """Return the state after a segment; rows: as they left the last block."""

    def initial(self, blocks: Any, linears: Linears) -> list[Initial]:
        """Return, for each block, what its parts begin a document with: there are none."""
        return [{} for _ in blocks]

    def handed_on(self, carried: Carried) -> None:
        """Return None: no random state passing."""
        return None
