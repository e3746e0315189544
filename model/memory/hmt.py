"""Hierarchical Memory Transformer (He et al. 2024, 2405.06067): a bank of memories, searched.

Every segment leaves one row, its memory, in a bank. The stack summarises the first half of a
segment in one row; with it the segment searches the bank (softmax of q k / sqrt(search_dim)), and
what it finds, P, stands beside its tokens and behind them, where it becomes the next memory. The
last `sensory` tokens of the segment before are read again in front.

    P | last memory | sensory | tokens ... | P

One departure: as published, all tokens of a segment read P, which has seen half of them, so they
see their own future. Here P is read from the segment's middle on; before it tokens read the last
memory, as in RMT. Without search (training's first stage) the last memory stands in P's place
behind, and nothing is summarised.

Summaries depend on tokens alone, so those of all segments of a forward pass are one call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import HmtMemory, ModelConfig
from model.interfaces import Segments
from model.memory.frame import Frame, Rows
from model.memory.in_turn import InTurn, Stack
from model.precision import sum_dtype


class HmtState(NamedTuple):
    """The bank, its newest memory last, and the end of the last segment."""

    bank: Tensor  # [B, L, D], float32 or wider
    filled: Tensor  # [B] int64: memories of this document in the bank
    sensory: Tensor  # [B, k] int64 tokens


class HmtPrepared(NamedTuple):
    """What a segment needs that depends on its own tokens alone."""

    summary: Tensor | None  # [B, D]; None: no search yet
    sensory: Tensor  # [B, k]: its last tokens


class Hmt(InTurn):
    """The summary prompt, the first memory, and the search."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        memory = config.memory
        assert isinstance(memory, HmtMemory)
        self.memory, self.hidden_size = memory, config.hidden_size
        self.prompt = nn.Parameter(torch.empty(1, config.hidden_size))
        self.first = nn.Parameter(torch.empty(1, config.hidden_size))
        self.query = nn.Linear(config.hidden_size, memory.search_dim, bias=False)
        self.key = nn.Linear(config.hidden_size, memory.search_dim, bias=False)

    def empty(self, batch: int, like: Tensor) -> HmtState:
        """Return an empty bank."""
        wide = sum_dtype(like)
        shape = (batch, self.memory.bank, self.hidden_size)
        return HmtState(
            torch.zeros(shape, device=like.device, dtype=wide),
            torch.zeros(batch, device=like.device, dtype=torch.int64),
            torch.zeros(batch, self.memory.sensory, device=like.device, dtype=torch.int64),
        )

    def prepare(
        self, stack: Stack, tokens: Tensor, segments: Segments, step: int | None
    ) -> list[HmtPrepared]:
        """Return every segment's summary and last tokens."""
        last = self._last_tokens(tokens, segments).unbind(1)
        first = self.memory.search_from
        if first is None or (step is not None and step < first):
            return [HmtPrepared(None, ids) for ids in last]
        halves = tokens[:, :, : tokens.shape[2] // 2]
        summaries = self._summarise(stack, halves, segments).unbind(1)
        return [HmtPrepared(*pair) for pair in zip(summaries, last, strict=True)]

    def unknown(self) -> HmtPrepared:
        """Return no summary: what is searched for joins at halfway."""
        return HmtPrepared(None, self.first.new_zeros(0, dtype=torch.int64))

    def open(
        self, stack: Stack, segments: Segments, state: HmtState, prepared: HmtPrepared
    ) -> tuple[Rows, tuple[HmtState, HmtPrepared]]:
        """Search, and return the rows around the segment."""
        starts, linears = segments.starts[:, 0], stack.linears
        state = state._replace(filled=state.filled.masked_fill(starts, 0))
        some = (state.filled > 0)[:, None]
        first = self.first.to(state.bank.dtype)
        last = torch.where(some, state.bank[:, -1], first).unsqueeze(1)
        sensory = linears.gather(stack.embed(state.sensory)).unflatten(0, state.sensory.shape)
        parts = [last, sensory.to(last.dtype), last]
        late = prepared.summary is not None
        if prepared.summary is not None:
            found = self._recall(prepared.summary, state).unsqueeze(1)
            parts = [found, last, sensory.to(last.dtype), found]
        else:  # every parameter has a gradient in every stage
            unused = self.query.weight.sum() + self.key.weight.sum() + self.prompt.sum()
            parts[0] = last + 0 * unused
        frame = Frame(front=1, back=1, late=int(late), sensory=self.memory.sensory, causal=True)
        x = linears.scatter(torch.cat(parts, 1).flatten(0, 1))
        return Rows(frame, x, some.squeeze(1)), (state, prepared)

    def halfway(
        self,
        stack: Stack,
        segments: Segments,
        tokens: Tensor,
        rest: tuple[HmtState, HmtPrepared],
    ) -> Rows | None:
        """Return what the search finds with the first half."""
        if self.memory.search_from is None:
            return None
        summary = self._summarise(stack, tokens.unsqueeze(1), segments).squeeze(1)
        frame = Frame(late=1, gap=1 + self.memory.sensory)
        return Rows(frame, stack.linears.scatter(self._recall(summary, rest[0])))

    def close(
        self, stack: Stack, segments: Segments, rows: Rows, rest: tuple[HmtState, HmtPrepared]
    ) -> HmtState:
        """Put the segment's memory into the bank; the oldest leaves it where it is full."""
        state, prepared = rest
        left = stack.linears.gather(stack.normed(rows.x)).unflatten(0, (segments.batch, -1))
        memory = left[:, -1:].to(state.bank.dtype)
        return HmtState(
            torch.cat((state.bank[:, 1:], memory), 1),
            (state.filled + 1).clamp(max=self.memory.bank),
            prepared.sensory,
        )

    def _recall(self, summary: Tensor, state: HmtState) -> Tensor:
        """Return the bank's mean as the summary weighs it, or of an empty bank `first`: [B, D]."""
        found: Tensor = self.attention(summary, state).unsqueeze(1) @ state.bank
        first = self.first.to(state.bank.dtype)
        return torch.where((state.filled > 0)[:, None], found.squeeze(1), first)

    def attention(self, summary: Tensor, state: HmtState) -> Tensor:
        """Return how much of each memory in the bank is recalled: [B, L]."""
        wide = state.bank.dtype
        scores = self.scores(summary.unsqueeze(1), state.bank).squeeze(1)
        places = torch.arange(self.memory.bank, device=scores.device)
        empty = places < self.memory.bank - state.filled.unsqueeze(1)
        weights: Tensor = scores.masked_fill(empty, torch.finfo(wide).min).softmax(-1)
        return weights.masked_fill(empty, 0.0)

    def scores(self, summaries: Tensor, bank: Tensor) -> Tensor:
        """Return how well memories [..., L, D] match summaries [..., R, D]: [..., R, L]."""
        wide = bank.dtype
        queries = summaries.to(wide) @ self.query.weight.to(wide).t()
        keys = bank @ self.key.weight.to(wide).t()
        found: Tensor = queries @ keys.mT * self.memory.search_dim**-0.5
        return found

    def _summarise(self, stack: Stack, tokens: Tensor, segments: Segments) -> Tensor:
        """Return one row for each first half of a segment, tokens [B, N, S / 2]: [B, N, D]."""
        batch, count, length = tokens.shape
        sequence = segments.sequence.first_half()
        segment_len = length * sequence.size
        positions = sequence.positions(segment_len).to(tokens.device)
        cos, sin = segments.rope(positions.unsqueeze(0))
        alone = segments._replace(
            batch=batch * count, num_segments=1, length=length, segment_len=segment_len,
            starts=torch.ones(batch * count, 1, dtype=torch.bool, device=tokens.device),
            window=0, cos=cos, sin=sin, sequence=sequence,
        )  # fmt: skip
        wide = sum_dtype(self.prompt)
        prompt = self.prompt.to(wide).expand(batch * count, 2, -1)
        rows = Rows(Frame(front=1, back=1), stack.linears.scatter(prompt.flatten(0, 1)))
        _, after, _ = stack.through(stack.embed(tokens), rows, alone, None)
        assert after is not None
        left: Tensor = stack.linears.gather(stack.normed(after.x)).unflatten(0, (batch, count, 2))
        return left[:, :, 1]

    def _last_tokens(self, tokens: Tensor, segments: Segments) -> Tensor:
        """Return the last k tokens of each segment, wherever they live: [B, N, k]."""
        count, end = self.memory.sensory, segments.segment_len
        places = segments.sequence.positions(end).to(tokens.device) - (end - count)
        # ids are under 2^24; what stands before the last k lands in a place of its own
        found = torch.zeros(*tokens.shape[:2], count + 1, device=tokens.device)
        found[:, :, places.where(places >= 0, count)] = tokens.to(found.dtype)
        return segments.sequence.total(found[:, :, :count].contiguous()).long()
