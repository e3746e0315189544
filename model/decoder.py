"""A Llama-style decoder over segments, with a memory plugged into each block."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from model.config import ComputeConfig, ModelConfig
from model.interfaces import Linears, Segments, Sequence
from model.layers import QKV, RMSNorm, SwiGLU
from model.local import FoldedSequence, LocalLinears
from model.loss import chunked_loss
from model.memory import MEMORIES
from model.memory.base import Initial, Mixer, State
from model.rope import rope_tables


class Block(nn.Module):
    """norm, attention, +, norm, SwiGLU, +, over flat rows; the mixer says what attends."""

    def __init__(
        self, config: ModelConfig, linears: Linears, compute: ComputeConfig, mixer: Mixer
    ) -> None:
        super().__init__()
        self.selective = compute.checkpointing == "selective"
        self.hidden_size, self.head_dim = config.hidden_size, config.head_dim
        self.num_kv_heads = config.num_kv_heads // linears.size
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.qkv = QKV(config, linears)
        self.output = linears.row(config.num_heads * config.head_dim, config.hidden_size)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = SwiGLU(config, linears, compute.ffn_chunk)
        self.mixer = mixer

    def forward(
        self,
        x: Tensor,
        segments: Segments | None = None,
        state: State = None,
        initial: Initial = None,
    ) -> Any:
        """Return (rows, state after) of token rows x; without segments, memory rows x alone."""
        if segments is None:
            return self.mixer.alone(self, x)
        return self.mixer.mix(self, x, segments, state, initial)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [all rows, H, K], k and v [all rows, Hkv, K] of rows x, not rotated."""
        result: tuple[Tensor, Tensor, Tensor] = self._cheaply(
            lambda x: self.qkv(self.attention_norm(x)), x
        )
        return result

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the block's output: rows x, attended [all rows, H, K] -> [rows, D]."""

        def rest(x: Tensor, attended: Tensor) -> Tensor:
            x = x + self.output(attended.flatten(-2))
            result: Tensor = x + self.ffn(self.ffn_norm(x))
            return result

        result: Tensor = self._cheaply(rest, x, attended)
        return result

    def _cheaply(self, run: Any, *args: Tensor) -> Any:
        """Run, recomputing in backward all but the matrix products if checkpointing=selective."""
        if not self.selective or not torch.is_grad_enabled():
            return run(*args)
        contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts)


def _keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


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
        self, x: Tensor, labels: Tensor | None, scale: Tensor | None, tied: Tensor | None
    ) -> Any:
        """Return (loss, token losses [all rows]); without labels this rank's logits.

        Logits end at vocab_size where the matrix is whole; a tensor-parallel part of them may end
        with columns of the padding, which stand for no token.
        """
        hidden = self.linears.enter(self.norm(x))
        weight = self.output.weight if tied is None else tied
        assert isinstance(weight, Tensor)
        if labels is None:
            logits = hidden @ weight.t()
            return logits[:, : self.vocab_size] if self.linears.size == 1 else logits
        assert scale is not None
        return chunked_loss(
            hidden,
            weight,
            labels,
            scale,
            chunk=self.chunk,
            cross_entropy=lambda logits, labels: self.linears.cross_entropy(
                logits, labels, self.vocab_size
            ),
        )


class Output(NamedTuple):
    """What a forward pass over N segments of B streams gives."""

    loss: Tensor  # 0-dim: sum over this rank's targets of -log p, times scale
    token_losses: Tensor  # [B, N, S] float32, 0 where the label is IGNORE
    state: list[State]  # after the last segment, one a layer


def _instead(given: Tensor, own: Tensor) -> Tensor:
    return given + 0 * own if given.is_floating_point() else given


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
        self.memory = MEMORIES[config.memory.name](config)
        self.embedding = self.linears.embedding(config.padded_vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, self.linears, self.compute, self.memory.mixer())
            for _ in range(config.num_layers)
        )
        self.head = Head(config, self.linears, self.compute)

    def forward(
        self,
        tokens: Tensor,
        starts: Tensor,
        state: list[State] | None = None,
        *,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
        passed: list[Initial] | None = None,
    ) -> Any:
        """Return an Output; without labels (logits [B, N, S, V], state).

        tokens, labels [B, N, S] int64, this rank's slice of each segment; starts [B, N] bool: a
        document begins there; state: None for streams that have read nothing; scale 0-dim:
        1 / the global number of targets; passed: what documents begin with instead of the
        memory's own start (random state passing).
        """
        segments = self.segments(tokens, starts, state)
        blocks = self.layers()
        initial = self.memory.initial(blocks, self.linears)
        if passed is not None:
            # The learned start stays in the graph (times 0): every parameter has a gradient.
            initial = [
                type(own)(*(_instead(given, mine) for given, mine in zip(new, own, strict=True)))
                for new, own in zip(passed, initial, strict=True)
            ]
        x = self.embedding(tokens.flatten())
        before = state or [block.mixer.empty(block, segments, x) for block in blocks]
        after: list[State] = []
        for block, old, begin in zip(blocks, before, initial, strict=True):
            x, new = self._run(block, x, segments, old, begin)
            after.append(new)
        tied = self.embedding.weight if self.config.tie_embeddings else None
        if labels is None:
            return self.head(x, None, None, tied).unflatten(0, tokens.shape), after
        loss, token_losses = self.head(x, labels.flatten(), scale, tied)
        return Output(loss, token_losses.unflatten(0, tokens.shape), after)

    def layers(self) -> list[Block]:
        """Return the blocks, bottom first."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if self.compute.checkpointing == "block" and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def segments(self, tokens: Tensor, starts: Tensor, state: list[State] | None) -> Segments:
        """Return what the layers know of these segments."""
        batch, count, length = tokens.shape
        if state is None:
            starts = torch.cat((torch.ones_like(starts[:, :1]), starts[:, 1:]), 1)
        segment_len, window = length * self.sequence.size, self.config.window
        like = next(self.parameters())

        def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
            return rope_tables(positions, self.config.head_dim, self.config.rope_base, like)

        first = torch.arange(window + count).unsqueeze(1) * segment_len
        cos, sin = tables(first + self.sequence.positions(segment_len))
        slot_cos = slot_sin = None
        if slots := self.memory.slots:
            ends = torch.arange(window, window + count + 1).unsqueeze(1) * segment_len
            slot_cos, slot_sin = tables(ends + torch.arange(-slots, 0))
        return Segments(
            batch, count, length, segment_len, starts, cos, sin, slot_cos, slot_sin,
            self.sequence, self.linears,
        )  # fmt: skip
