"""Reading a stream in pieces of any length, with the memory of training and bounded work.

Whole segments go through the decoder as in training. In an open segment, tokens are read as they
come: what they read beside themselves (window, memory) stands still until the segment is complete,
so a layer keeps that and the keys of the segment's tokens so far. A complete segment is read once
more as a whole, which is what moves the memory on.

Landmark attention reads blocks; there an open segment is read whole at every call, with padding
behind it: tokens never see what comes later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import LandmarkMemory
from model.decoder import Decoder
from model.memory.base import Carried
from model.memory.frame import Rows
from model.memory.in_turn import InTurn
from model.memory.mixer import OpenLayer


class Incremental:
    """An open segment whose layers keep what its tokens have shown."""

    def __init__(self, model: Decoder, segment_len: int, starts: Tensor, carried: Carried) -> None:
        self.model, batch = model, starts.shape[0]
        tokens = torch.zeros(batch, 1, segment_len, dtype=torch.int64, device=starts.device)
        self.segments = model.segments(tokens, starts, fresh=False)
        self.tokens = tokens[:, 0, :0]
        self.half = segment_len // 2
        rows: Rows | None = None
        if isinstance(model.memory, InTurn):
            unknown = model.memory.unknown()
            rows, self.rest = model.memory.open(model, self.segments, carried.stack, unknown)
            rows = _before(rows, batch)
        initial = model.memory.initial(model.layers(), model.linears)
        self.layers: list[OpenLayer] = []
        for block, state, begin in zip(model.layers(), carried.layers, initial, strict=True):
            rows, layer = block.mixer.open(block, rows, self.segments, state, begin)
            self.layers.append(layer)

    def read(self, tokens: Tensor, *, every: bool) -> Tensor:
        """Return logits [B, c, V] of the next tokens [B, c], or [B, 1, V] of the last one.

        Reads up to the segment's middle, then from there.
        """
        until = self.half - self.tokens.shape[1]
        if not 0 < until <= tokens.shape[1]:
            return self._read(tokens, every)
        first = self._read(tokens[:, :until], every)
        self._join_at_half()
        rest = tokens[:, until:]
        if not rest.shape[1]:
            return first
        second = self._read(rest, every)
        return torch.cat((first, second), 1) if every else second

    def _read(self, tokens: Tensor, every: bool) -> Tensor:
        model, x = self.model, self.model.embed(tokens)
        for i, block in enumerate(model.layers()):
            x, self.layers[i] = block.mixer.extend(block, x, self.segments, self.layers[i])
        self.tokens = torch.cat((self.tokens, tokens), 1)
        x = x.unflatten(0, tokens.shape)
        return model.logits(x if every else x[:, -1:])

    def _join_at_half(self) -> None:
        memory = self.model.memory
        if not isinstance(memory, InTurn):
            return
        rows = memory.halfway(self.model, self.segments, self.tokens, self.rest)
        if rows is not None:
            for i, block in enumerate(self.model.layers()):
                rows, self.layers[i] = block.mixer.join(block, rows, self.segments, self.layers[i])


class Recomputed:
    """An open segment that is read from its beginning at every call: the slow twin."""

    def __init__(self, model: Decoder, segment_len: int, starts: Tensor, carried: Carried) -> None:
        self.model, self.segment_len = model, segment_len
        self.starts, self.carried = starts, carried
        self.tokens: Tensor | None = None

    def read(self, tokens: Tensor, *, every: bool) -> Tensor:
        """Return logits [B, c, V] of the next tokens [B, c], or [B, 1, V] of the last one."""
        known = tokens if self.tokens is None else torch.cat((self.tokens, tokens), 1)
        self.tokens = known
        padded = known.new_zeros(known.shape[0], 1, self.segment_len)
        padded[:, 0, : known.shape[1]] = known
        end = known.shape[1]
        only = None if every else end - 1
        logits, _ = self.model(padded, self.starts, self.carried, only=only, filled=end)
        new: Tensor = logits[:, 0, end - tokens.shape[1] : end] if every else logits[:, 0]
        return new

    def hold(self, tokens: Tensor) -> None:
        """Take tokens whose logits nobody wants; they are read with the next ones."""
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), 1)


class Stream:
    """B streams that read on and on; what it holds is bounded by the segment and the memory.

    segment_len: positions of a segment, as in training. Where the model has landmark memory, a
    landmark is put behind every block - 1 tokens read.
    """

    def __init__(
        self,
        model: Decoder,
        segment_len: int,
        *,
        batch: int = 1,
        segments_per_call: int = 1,
    ) -> None:
        memory = model.config.memory
        self.model, self.segment_len = model, segment_len
        self.block = memory.block if isinstance(memory, LandmarkMemory) else None
        self.landmark, self.segments_per_call = model.config.landmark, segments_per_call
        # Tokens of text that a segment takes; landmarks take the rest of its positions.
        self.text_len = segment_len
        if self.block is not None:
            self.text_len = segment_len // self.block * (self.block - 1)
        device = next(model.parameters()).device
        self.starts = torch.ones(batch, 1, dtype=torch.bool, device=device)
        self.carried = empty(model, self.starts, segment_len)
        self.num_tokens = 0  # read so far, in each stream
        self.open: Incremental | Recomputed | None = None
        self.known: Tensor | None = None  # [B, p] tokens of the open segment

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, V] after the last of tokens [B, T], T at least 1."""
        return self._read(tokens, every=False)[:, -1]

    @torch.no_grad()
    def read_all(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, T, V] after each of tokens [B, T]."""
        return self._read(tokens, every=True)

    def _read(self, tokens: Tensor, *, every: bool) -> Tensor:
        found: list[Tensor] = []
        while tokens.shape[1]:
            whole = tokens.shape[1] // self.text_len
            if self.known is None and whole:
                count = min(whole, self.segments_per_call)
                taken, tokens = _split(tokens, count * self.text_len)
                logits = self._segments(taken, count, every)
            else:
                held = 0 if self.known is None else self.known.shape[1]
                taken, tokens = _split(tokens, self.text_len - held)
                logits = self._in_segment(taken, every)
            self.num_tokens += taken.shape[1]
            found = [*found, logits] if every else [logits]
        return torch.cat(found, 1)

    def _segments(self, tokens: Tensor, count: int, every: bool) -> Tensor:
        """Read whole segments [B, count * text_len]; move the memory on."""
        last = -1 if self.block is None else -2  # a landmark stands at a segment's end
        starts = torch.cat((self.starts, self.starts.new_zeros(len(tokens), count - 1)), 1)
        logits, self.carried = self.model(
            self._spelled(tokens).unflatten(1, (count, -1)),
            starts,
            self.carried,
            only=None if every else last,
        )
        self.starts = torch.zeros_like(self.starts)
        logits = logits.flatten(1, 2)
        return self._of_text(logits) if every and self.block is not None else logits

    def _in_segment(self, tokens: Tensor, every: bool) -> Tensor:
        """Read tokens that the open segment has room for."""
        held = self.known
        if self.open is None:
            kind = Incremental if self.block is None else Recomputed
            self.open = kind(self.model, self.segment_len, self.starts, self.carried)
        known = tokens if held is None else torch.cat((held, tokens), 1)
        if self.block is None:
            logits = self.open.read(tokens, every=every)
        elif every:
            first = 0 if held is None else self._spelled(held).shape[1]
            read = self._spelled(known)[:, first:]
            logits = self._of_text(self.open.read(read, every=True), first)
        else:
            logits = self._last_of_text(held, known)
        self.known = known
        if known.shape[1] == self.text_len:
            self._segments(known, 1, every=False)
            self.open = self.known = None
        return logits

    def _last_of_text(self, held: Tensor | None, known: Tensor) -> Tensor:
        """Read what is new of the known tokens; return the logits [B, 1, V] of the last one."""
        assert self.open is not None and self.block is not None
        first = 0 if held is None else self._spelled(held).shape[1]
        new = self._spelled(known)[:, first:]
        landmark = known.shape[1] % (self.block - 1) == 0  # one closes the block behind the token
        logits = self.open.read(new[:, :-1] if landmark else new, every=False)
        if landmark and isinstance(self.open, Recomputed):
            self.open.hold(new[:, -1:])
        return logits

    def _spelled(self, tokens: Tensor) -> Tensor:
        """Return tokens [B, T] with a landmark behind every block - 1 of them."""
        if self.block is None:
            return tokens
        assert self.landmark is not None
        parts = []
        for part in tokens.split(self.block - 1, 1):
            parts.append(part)
            if part.shape[1] == self.block - 1:
                parts.append(torch.full_like(part[:, :1], self.landmark))
        return torch.cat(parts, 1)

    def _of_text(self, logits: Tensor, first: int = 0) -> Tensor:
        """Return the logits of text among [B, positions, V], from position `first` on."""
        assert self.block is not None
        places = torch.arange(first, first + logits.shape[1], device=logits.device)
        return logits[:, places % self.block != self.block - 1]


def empty(model: Decoder, starts: Tensor, segment_len: int) -> Carried:
    """Return the state of streams that have read nothing; starts [B, 1]."""
    tokens = torch.zeros(len(starts), 1, segment_len, dtype=torch.int64, device=starts.device)
    return model.empty(model.segments(tokens, starts, fresh=True))


def _before(rows: Rows, batch: int) -> Rows | None:
    """Return those of a segment's rows that stand before its tokens."""
    frame = rows.frame
    if not frame.before:
        return None
    x = rows.x.unflatten(0, (batch, frame.rows))[:, : frame.before].flatten(0, 1)
    return rows._replace(frame=frame._replace(back=0), x=x)


def _split(tokens: Tensor, at: int) -> tuple[Tensor, Tensor]:
    return tokens[:, :at], tokens[:, at:]
