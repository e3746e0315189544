"""TransformerFAM: feedback attention memory (Hwang et al. 2024, arXiv 2404.09173, Algorithm 2).

Each layer carries F slots. At segment n a token reads the slots left by segment n-1, the M segments
before and its own segment; the slots then read themselves and the whole segment, with the layer's
own weights, FFN included, and become what segment n+1 reads. Tokens never read slots that have seen
their segment, so the order of time holds to the bit.

In one layer the queries and keys of tokens do not depend on the layer's slots. So the projections
of all segments run in one call, then the chain over n on F rows, then all attention in one call.

What is carried (`state`, see carry.Carry): `paper` feeds the block's output back as it is; `norm`
and `latch` are ours. So is `first="hidden"`: a document's first segment does not read the prompt,
and a model that was trained without a memory is there what it was.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import FamMemory, ModelConfig
from model.deferred import deferred
from model.fold import Piece
from model.interfaces import Linears, Segments
from model.memory.base import Block, Part, PartMemory, Tokens, stack_segments
from model.memory.carry import Carry
from model.precision import sum_dtype
from model.rope import rotate


class FamState(NamedTuple):
    """A layer's slots after the last segment."""

    slots: Tensor  # [B, F, D], float32 or wider
    fresh: Tensor  # [B] bool: the slots hold the prompt, no text: the first update adds no residual


class FamInitial(NamedTuple):
    """The slots a document begins with."""

    slots: Tensor  # [F, D]
    fresh: Tensor  # 0-dim bool: False where they come from other text (random state passing)


class FamRead(NamedTuple):
    """What tokens read of the slots, rotated."""

    k: Tensor  # [B, F, Hkv, K]
    v: Tensor
    visible: Tensor  # [B] bool: False where the slots hold the prompt and it is hidden


class _Slots(NamedTuple):
    """The slots as rows [B * F, D], scattered as rows of tokens are, on their way."""

    rows: Tensor
    fresh: Tensor  # [rows, 1] bool
    prompt: Tensor  # [B] bool: likewise, of each stream
    q: Tensor | None = None  # [B, F, H, K]: what they ask the segment


Table = tuple[Tensor, Tensor]
"""(cos, sin) of RoPE."""


class _Place(NamedTuple):
    """A segment as a chain meets it."""

    begin: Tensor  # [rows, D]: the slots that a document begins with, scattered
    fresh: Tensor  # 0-dim bool, of these
    starts: Tensor  # [B] bool: a document begins
    row_starts: Tensor  # [rows, 1] bool: likewise, of each row
    here: Table  # where the slots stand as keys
    asks: Table  # and as queries


class FamPart(Part):
    """The feedback chain of one layer."""

    def __init__(self, config: ModelConfig, memory: FamMemory) -> None:
        super().__init__()
        self.memory = memory
        self.carry = Carry(config.hidden_size, config.norm_eps, memory.state, memory.beta)

    def empty(self, block: Block, segments: Segments, like: Tensor) -> FamState:
        """Return slots that hold nothing yet."""
        wide = sum_dtype(like)
        shape = (segments.batch, self.memory.slots, block.hidden_size)
        slots = torch.zeros(shape, device=like.device, dtype=wide)
        return FamState(slots, torch.ones_like(segments.starts[:, 0]))

    def open(
        self, block: Block, segments: Segments, n: int, state: FamState, initial: FamInitial
    ) -> tuple[FamRead, _Slots]:
        """Return the keys and values of the slots that segment n - 1 left."""
        (place,) = self._places(segments, range(n, n + 1), initial)
        return self._open(block, place, self._scatter(segments, state))

    def close(
        self,
        block: Block,
        segments: Segments,
        n: int,
        opened: FamRead,
        rest: _Slots,
        tokens: Tokens,
    ) -> FamState:
        """Return the slots that have read segment n."""
        return self._gather(segments, self._close(block, segments, n, opened, rest, tokens))

    def chain(
        self,
        block: Block,
        segments: Segments,
        tokens: Tokens,
        state: FamState,
        initial: FamInitial,
    ) -> tuple[FamRead, FamState]:
        """Open and close segment after segment, the slots scattered all the way."""
        found, slots = [], self._scatter(segments, state)
        places = self._places(segments, range(segments.num_segments), initial)
        with deferred():
            for n, place in enumerate(places):
                opened, slots = self._open(block, place, slots)
                slots = self._close(block, segments, n, opened, slots, tokens)
                found.append(opened)
        return stack_segments(found), self._gather(segments, slots)

    def begin(
        self, block: Block, segments: Segments, state: FamState, initial: FamInitial
    ) -> FamRead:
        """Return the first slots' keys and values before each segment, from one projection."""
        count, linears = segments.num_segments, segments.linears
        _, k, v, _ = block.project(linears.scatter(initial.slots))
        tables = self._tables(segments, range(count))
        shape = (segments.batch, count, -1, -1, -1)
        visible = (~initial.fresh).expand(segments.batch, count)
        keys = torch.stack([rotate(k, *here) for here in tables])
        return FamRead(keys.expand(shape), v.expand(shape), visible)

    def piece(self, segments: Segments, opened: FamRead) -> Piece:
        """Return the slots' keys."""
        hidden = self.memory.first == "hidden"
        return Piece(opened.k, opened.v, opened.visible if hidden else None)

    def _places(self, segments: Segments, numbers: range, initial: FamInitial) -> list[_Place]:
        """Return what is known of segments before their slots are."""
        linears = segments.linears
        begin = linears.scatter(initial.slots.expand(segments.batch, -1, -1).flatten(0, 1))
        starts = segments.starts[:, numbers.start : numbers.stop]
        row_starts = self._per_row(segments, starts).split(1, 1)
        tables = self._tables(segments, range(numbers.start, numbers.stop + 1))
        asks = tables[self.memory.query_position == "current" :]
        return [
            _Place(begin, initial.fresh, *of_segment)
            for of_segment in zip(starts.unbind(1), row_starts, tables, asks, strict=False)
        ]

    def _open(self, block: Block, place: _Place, slots: _Slots) -> tuple[FamRead, _Slots]:
        rows = torch.where(place.row_starts, place.begin, slots.rows)
        fresh = torch.where(place.row_starts, place.fresh, slots.fresh)
        prompt = torch.where(place.starts, place.fresh, slots.prompt)
        batch = len(place.starts)
        q, k, v, _ = (part.unflatten(0, (batch, -1)) for part in block.project(rows))
        read = FamRead(rotate(k, *place.here), v, ~prompt)
        return read, _Slots(rows, fresh, prompt, rotate(q, *place.asks))

    def _close(
        self,
        block: Block,
        segments: Segments,
        n: int,
        opened: FamRead,
        slots: _Slots,
        tokens: Tokens,
    ) -> _Slots:
        assert slots.q is not None
        attended = segments.sequence.fold_slots(
            slots.q, *tokens.segment(n), pieces=[Piece(opened.k, opened.v)]
        )
        residual = torch.where(slots.fresh, 0.0, slots.rows)
        rows = self.carry(block.finish(residual, attended.flatten(0, 1)))
        return _Slots(rows, torch.zeros_like(slots.fresh), torch.zeros_like(slots.prompt))

    def _tables(self, segments: Segments, numbers: range) -> list[Table]:
        """Return, for each segment, RoPE of the last F positions before it: [F, 1, K / 2] each."""
        device, slots = segments.starts.device, self.memory.slots
        ends = torch.arange(numbers.start, numbers.stop, device=device) + segments.window
        places = torch.arange(-slots, 0, device=device)
        cos, sin = segments.rope((ends * segments.segment_len).unsqueeze(1) + places)
        return list(zip(cos.unsqueeze(2), sin.unsqueeze(2), strict=True))

    def _per_row(self, segments: Segments, x: Tensor) -> Tensor:
        """[B, n] bool -> one entry for each of this rank's slot rows: [rows, n]."""
        rows = x.to(torch.float32).repeat_interleave(self.memory.slots, 0)
        return segments.linears.scatter(rows).bool()

    def _scatter(self, segments: Segments, state: FamState) -> _Slots:
        rows = segments.linears.scatter(state.slots.flatten(0, 1))
        return _Slots(rows, self._per_row(segments, state.fresh.unsqueeze(1)), state.fresh)

    def _gather(self, segments: Segments, slots: _Slots) -> FamState:
        whole = segments.linears.gather(slots.rows).unflatten(0, (segments.batch, -1))
        return FamState(whole, torch.zeros_like(segments.starts[:, 0]))


class Fam(PartMemory):
    """The prompt whose way through the layers gives each layer its first slots.

    The rows run alone, before any token: a layer's first slots are the prompt as that layer gets
    it. (Were they updated by segment 1 on the way, its tokens would see their own future.)
    """

    def __init__(self, config: ModelConfig, memory: FamMemory) -> None:
        super().__init__()
        self.memory = memory
        self.prompt = nn.Parameter(torch.empty(memory.slots, config.hidden_size))

    def part(self, config: ModelConfig, linears: Linears) -> Part:
        """Return the chain of one layer."""
        return FamPart(config, self.memory)

    def initial(self, blocks: Items[Block], linears: Linears) -> list[FamInitial]:
        """Return the slots each layer begins a document with."""
        wide = sum_dtype(self.prompt)
        fresh = torch.ones((), dtype=torch.bool, device=self.prompt.device)
        x = linears.scatter(self.prompt.to(wide))
        initial = [FamInitial(linears.gather(x), fresh)]
        for block in blocks[:-1]:
            x = block(x)
            initial.append(FamInitial(linears.gather(x), fresh))
        return initial

    def handed_on(self, states: list[FamState]) -> list[FamInitial]:
        """Return the first stream's slots. They hold text: no zero residual, no gradient."""
        holds_text = torch.zeros((), dtype=torch.bool, device=states[0].slots.device)
        return [FamInitial(state.slots[0].detach().clone(), holds_text) for state in states]
