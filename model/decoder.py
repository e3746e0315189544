"""A Llama-style decoder over segments, with a memory plugged into each block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.block import Block
from model.config import ComputeConfig, ModelConfig
from model.interfaces import Linears, Segments, Sequence
from model.layers import RMSNorm
from model.local import FoldedSequence, LocalLinears
from model.lora import add_adapters, freeze
from model.loss import chunked_loss, columns_of
from model.memory import MEMORIES, Memory
from model.memory.base import Carried, Initial, State
from model.memory.frame import Rows
from model.memory.in_turn import InTurn
from model.packed import Packed, check_documents
from model.rope import rope_tables
from model.wavefront import check_wavefront, diagonals


class Head(nn.Module):
    """Final norm, output matrix and loss; the matrix is the embedding's where tied."""

    def __init__(self, config: ModelConfig, linears: Linears, compute: ComputeConfig) -> None:
        super().__init__()
        self.linears, self.chunk, self.vocab_size = (
            linears,
            compute.loss_chunk,
            config.vocab_size,
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.output = linears.column(config.hidden_size, config.padded_vocab_size)

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None,
        scale: Tensor | None,
        tied: Tensor | None,
        rows: Tensor | None = None,
    ) -> Any:
        """Return (loss, token losses [all rows]); without labels this rank's logits.

        rows [W] int64: of all rows those whose logits are wanted (None: all). Logits end at
        vocab_size where the matrix is whole; a tensor-parallel part of them may end with columns of
        the padding, which stand for no token.
        """
        hidden = self.linears.enter(self.norm(x))
        weight = self.output.weight if tied is None else tied
        assert isinstance(weight, Tensor)
        if labels is None:
            logits = (hidden if rows is None else hidden[rows]) @ weight.t()
            return logits[..., : self.vocab_size] if self.linears.size == 1 else logits
        assert scale is not None
        return chunked_loss(
            hidden,
            weight,
            labels,
            scale,
            chunk=self.chunk,
            columns=columns_of(self.linears, weight.shape[0], self.vocab_size),
        )


class Output(NamedTuple):
    """What a forward pass over N segments of B streams gives."""

    loss: Tensor  # 0-dim: sum over this rank's targets of -log p, times scale
    token_losses: Tensor  # [B, N, S] float32, 0 where the label is IGNORE
    state: Carried  # after the last segment


class Decoder(nn.Module):
    """The model. Weights are uninitialised until model.init.initialise is called."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        sequence: Sequence | None = None,
        linears: Linears | None = None,
        compute: ComputeConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.compute = config, compute or ComputeConfig()
        self.sequence: Sequence = sequence or FoldedSequence()
        self.linears: Linears = linears or LocalLinears()
        self.memory: Memory = MEMORIES[config.memory.name](config)
        if self.compute.wavefront:
            name, chunk = config.memory.name, self.compute.ffn_chunk
            check_wavefront(name, self.memory, self.linears, chunk)
        self.embedding = self.linears.embedding(config.padded_vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(
                config, self.linears, self.compute, self.memory.mixer(config, self.linears, layer)
            )
            for layer in range(config.num_layers)
        )
        self.head = Head(config, self.linears, self.compute)
        self._kept: tuple[object, tuple[Tensor, Tensor]] | None = None
        if config.lora is not None:
            add_adapters(self.blocks, config.lora, self.linears)
            freeze(self, config.lora)

    def forward(
        self,
        tokens: Tensor,
        starts: Tensor,
        state: Carried | None = None,
        *,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
        passed: list[Initial] | None = None,
        step: int | None = None,
        weights: Tensor | None = None,
        only: int | None = None,
        wanted: Tensor | None = None,
        filled: int | None = None,
        documents: Tensor | None = None,
    ) -> Any:
        """Return an Output; without labels (logits [B, N, S, V], state).

        tokens, labels [B, N, S] int64, this rank's slice of each segment; starts [B, N] bool: a
        document begins there; state: None for streams that have read nothing; scale 0-dim: 1 / the
        global number of targets; passed: what documents begin with instead of the memory's own
        start (random state passing); step: of training, for memories that train in stages (None:
        the last one); weights [B, N]: the log of how many segments like it each segment stands for
        in what memories write (None: 1 each); only: logits of this place in the last segment alone,
        [B, 1, 1, V], on one device (-1: of the last token); wanted [B, N, S] bool: logits of these
        places alone, [W, V], stream by stream; filled: one open segment (N = 1) of so many tokens,
        padding behind them; its state is of no use; documents [B, N, S of all ranks] int64, CPU:
        packed segments, which document of its segment each token is of, 0 for the first. The others
        read as at a segment's start: themselves and what memories begin with. A segment behind one
        of several documents must start one.
        """
        if documents is not None and not self.memory.packs:
            raise ValueError(
                f"documents are packed for none, window, fam, infini, abc and cmab;"
                f" {self.config.memory.name} reads whole segments"
            )
        if weights is not None and not self.memory.weighted:
            raise ValueError(
                f"weights count what a memory writes, and {self.config.memory.name} has no such"
                " count; they are for infini (linear), abc and cmab"
            )
        segments = self.segments(
            tokens,
            starts,
            fresh=state is None,
            weights=weights,
            filled=filled,
            documents=documents,
        )
        before = state or self.empty(segments)
        if isinstance(self.memory, InTurn):
            x, after = self._in_turn(self.memory, tokens, segments, before, step)
        else:
            x, _, layers = self.through(self.embed(tokens), None, segments, before.layers, passed)
            after = Carried(layers, [])
        tied = self.embedding.weight if self.config.tie_embeddings else None
        if only is not None:
            last = self._in_order(x, tokens.shape)[:, -1:]
            return self.logits(last.select(2, only).unsqueeze(2)), after
        if wanted is not None:
            places = torch.arange(tokens.numel(), device=x.device).view(tokens.shape)
            rows = self._as_rows(places).argsort()[wanted.flatten()]
            return self.head(x, None, None, tied, rows), after
        if labels is None:
            logits = self.head(x, None, None, tied)
            return self._in_order(logits, tokens.shape), after
        loss, token_losses = self.head(x, self._as_rows(labels), scale, tied)
        return Output(loss, self._in_order(token_losses, tokens.shape), after)

    @torch.no_grad()
    def read(
        self,
        tokens: Tensor,
        starts: Tensor,
        state: Carried | None = None,
        *,
        step: int | None = None,
    ) -> Carried:
        """Return the state that forward returns, without the work that only logits need.

        tokens [B, N, S], starts [B, N]. Of a memory inside the layers the top one writes, and reads
        nothing: half of the work of two layers, and no search for blocks that nobody asks for.
        """
        segments = self.segments(tokens, starts, fresh=state is None)
        before = state or self.empty(segments)
        if isinstance(self.memory, InTurn):
            return self._in_turn(self.memory, tokens, segments, before, step)[1]
        blocks, x = self.layers(), self.embed(tokens)
        initial, after = self.memory.initial(blocks, self.linears), []
        for block, old, begin in zip(blocks[:-1], before.layers, initial, strict=False):
            x, _, new = self._run(block, x, None, segments, old, begin)
            after.append(new)
        top = blocks[-1]
        after.append(top.mixer.remember(top, x, segments, before.layers[-1], initial[-1]))
        return Carried(after, [])

    def _in_turn(
        self,
        memory: InTurn,
        tokens: Tensor,
        segments: Segments,
        state: Carried,
        step: int | None,
    ) -> tuple[Tensor, Carried]:
        """Run segment after segment through the whole stack; return rows, by segment, and state."""
        layers, stack, found = state.layers, state.stack, []
        prepared = memory.prepare(self, tokens, segments, step)
        if self.compute.wavefront and segments.num_segments > 1:

            def enter(n: int) -> tuple[Tensor, Rows]:
                rows, _ = memory.open(self, segments.of(n), stack, prepared[n])
                return self.embed(tokens[:, n]), rows

            x, layers = diagonals(self.layers(), enter, segments, layers, self._run)
            return x, Carried(layers, stack)
        for n in range(segments.num_segments):
            one = segments.of(n)
            rows, rest = memory.open(self, one, stack, prepared[n])
            x, rows_after, layers = self.through(self.embed(tokens[:, n]), rows, one, layers)
            assert rows_after is not None
            stack = memory.close(self, one, rows_after, rest)
            found.append(x)
        return torch.cat(found), Carried(layers, stack)

    def through(
        self,
        x: Tensor,
        rows: Rows | None,
        segments: Segments,
        layers: list[State] | None,
        passed: list[Initial] | None = None,
    ) -> tuple[Tensor, Rows | None, list[State]]:
        """Return rows of tokens and of memory after all blocks, and the layers' states."""
        blocks = self.layers()
        initial = self.memory.initial(blocks, self.linears)
        if passed is not None:
            # The learned start stays in the graph (times 0): every parameter has a gradient.
            initial = _instead(passed, initial)
        if layers is None:
            layers = [block.mixer.empty(block, segments, x) for block in blocks]
        after: list[State] = []
        for block, old, begin in zip(blocks, layers, initial, strict=True):
            x, rows, new = self._run(block, x, rows, segments, old, begin)
            after.append(new)
        return x, rows, after

    def embed(self, tokens: Tensor) -> Tensor:
        """Return embeddings [rows, D] of tokens of any shape, scattered."""
        rows: Tensor = self.embedding(tokens.flatten())
        return rows

    def normed(self, rows: Tensor) -> Tensor:
        """Return rows [rows, D] after the final norm."""
        result: Tensor = self.head.norm(rows)
        return result

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [..., V] of rows x [..., D] that left the last block."""
        tied = self.embedding.weight if self.config.tie_embeddings else None
        result: Tensor = self.head(x, None, None, tied)
        return result

    def layers(self) -> list[Block]:
        """Return the blocks, bottom first."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def empty(self, segments: Segments) -> Carried:
        """Return the state of streams that have read nothing."""
        like = next(self.parameters())
        layers = [block.mixer.empty(block, segments, like) for block in self.layers()]
        stack = []
        if isinstance(self.memory, InTurn):
            stack = self.memory.empty(segments.batch, like)
        return Carried(layers, stack)

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if self.compute.checkpointing == "block" and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    def _as_rows(self, x: Tensor) -> Tensor:
        """[B, N, S] -> in the order in which the head gathers rows.

        Memories that go in turn scatter each segment's rows by themselves.
        """
        if not self.memory.in_turn:
            return x.flatten()
        ranks = self.linears.scattered
        return x.transpose(0, 1).reshape(x.shape[1], ranks, -1).transpose(0, 1).flatten()

    def _in_order(self, x: Tensor, shape: torch.Size) -> Tensor:
        """[all rows, ...] -> [B, N, S, ...]: the inverse of _as_rows."""
        if not self.memory.in_turn:
            whole: Tensor = x.unflatten(0, shape)
            return whole
        batch, count, length = shape
        by_rank = x.unflatten(0, (self.linears.scattered, count, -1))
        by_segment = by_rank.transpose(0, 1).flatten(1, 2)
        ordered: Tensor = by_segment.unflatten(1, (batch, length)).transpose(0, 1)
        return ordered

    def segments(
        self,
        tokens: Tensor,
        starts: Tensor,
        *,
        fresh: bool,
        weights: Tensor | None = None,
        filled: int | None = None,
        documents: Tensor | None = None,
    ) -> Segments:
        """Return what the layers know of these segments; fresh: the streams have read nothing."""
        batch, count, length = tokens.shape
        if fresh:
            starts = torch.cat((torch.ones_like(starts[:, :1]), starts[:, 1:]), 1)
        segment_len, window = length * self.sequence.size, self.config.window
        rope = functools.partial(
            rope_tables,
            head_dim=self.config.head_dim,
            base=self.config.rope_base,
            like=next(self.parameters()),
            scaling=self.config.rope_scaling,
        )
        packed = None
        if documents is None:
            cos, sin = self._turns(window + count, segment_len, rope)
        else:
            first = torch.arange(window + count).unsqueeze(1) * segment_len
            here = self.sequence.positions(segment_len)
            documents = documents.cpu()
            check_documents(documents, starts)
            packed = Packed(documents, here, starts.device)
            behind = first[window:] + packed.places(here)  # [B, N, S]
            before = (first[:window] + here).expand(batch, -1, -1)
            cos, sin = rope(torch.cat((before, behind), 1).to(starts.device))
        return Segments(
            batch, count, length, segment_len, starts, weights, window, cos, sin, filled, rope,
            self.sequence, self.linears, packed,
        )  # fmt: skip

    def _turns(
        self, count: int, segment_len: int, rope: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) of this rank's places in so many segments; the last are kept.

        A training asks for the same each time, and they are of the host, in float64.
        """
        like = next(self.parameters())
        key = (self.sequence, count, segment_len, like.dtype, like.device)
        if self._kept is None or self._kept[0] != key:
            first = torch.arange(count).unsqueeze(1) * segment_len
            with torch.inference_mode(False):  # a backward pass may want them later
                self._kept = key, rope(first + self.sequence.positions(segment_len))
        return self._kept[1]


def _instead(given: Any, own: Any) -> Any:
    """Return given, shaped as own, with own in its graph; own where nothing is given."""
    if isinstance(own, dict):
        return {
            name: _instead(given[name], part) if name in given else part
            for name, part in own.items()
        }
    if isinstance(own, Tensor):
        return given + 0 * own if own.is_floating_point() else given
    parts = [_instead(*pair) for pair in zip(given, own, strict=True)]
    return parts if isinstance(own, list) else type(own)(*parts)
