"""TransformerFAM: feedback attention memory (Hwang et al. 2024, arXiv 2404.09173, Algorithm 2).

Each layer carries F slots. At segment n a token reads the slots left by segment n-1, the M segments
before and its own segment; the slots then read themselves and the whole segment, with the layer's
own weights, FFN included, and become what segment n+1 reads. Tokens never read slots that have seen
their segment, so the order of time holds to the bit.

In one layer the queries and keys of tokens do not depend on the layer's slots. So the projections
of all segments run in one call, then the chain over n on F rows, then all attention in one call.

Three choices for what is carried (`state`): `paper` feeds the block's output back as it is, whose
norm grows with every segment until nothing new can be written; `norm` puts an RMSNorm with learned
gain on it; `latch` a gain * tanh(beta * rms-normalised), bounded and with fixed points.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import FamMemory, ModelConfig
from model.interfaces import Linears, Segments
from model.layers import normalise, scattered
from model.memory.base import Block, Mixer
from model.memory.window import Tokens, WindowState, empty_window, read_tokens
from model.rope import rope_tables, rotate


class FamState(NamedTuple):
    """A layer's slots after the last segment, with the window beside them."""

    slots: Tensor  # [B, F, D], float32 or wider
    fresh: Tensor  # [B] bool: the slots hold the prompt, no text: the first update adds no residual
    window: WindowState


class FamInitial(NamedTuple):
    """The slots a document begins with."""

    slots: Tensor  # [F, D]
    fresh: Tensor  # 0-dim bool: False where they come from other text (random state passing)


class FamMixer(Mixer):
    """Attention over slots, window and segment; the feedback chain of one layer."""

    def __init__(self, config: ModelConfig, memory: FamMemory) -> None:
        super().__init__()
        self.memory, self.eps, self.rope_base = memory, config.norm_eps, config.rope_base
        if memory.state != "paper":
            self.gain = scattered(nn.Parameter(torch.ones(config.hidden_size)))

    def mix(
        self, block: Block, x: Tensor, segments: Segments, state: FamState, initial: FamInitial
    ) -> tuple[Tensor, FamState]:
        """Return the block's output rows and the state after the last segment."""
        tokens = read_tokens(block, x, segments, state.window, self.memory.window)
        slot_keys, slots, fresh = self._chain(block, segments, tokens, state, initial)
        attended = segments.sequence.fold(
            tokens.q, tokens.k, tokens.v, slots=slot_keys, visible=tokens.visible
        )
        after = FamState(slots, fresh, tokens.state)
        return block.finish(x, attended.flatten(0, 2)), after

    def _chain(
        self,
        block: Block,
        segments: Segments,
        tokens: Tokens,
        state: FamState,
        initial: FamInitial,
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Run the slots through the segments.

        Returns the keys and values that tokens of each segment read, [B, N, F, Hkv, K] each, and
        the slots [B, F, D] and their freshness [B] after the last segment.
        """
        batch, num_slots, linears = segments.batch, self.memory.slots, segments.linears

        def per_row(x: Tensor) -> Tensor:
            """[B, ...] -> one entry for each of this rank's slot rows."""
            rows = x.to(torch.float32).unsqueeze(1).expand(-1, num_slots, *x.shape[1:])
            return linears.scatter(rows.flatten(0, 1)).bool().unsqueeze(-1)

        starts, fresh = per_row(segments.starts), per_row(state.fresh)
        rows = linears.scatter(state.slots.flatten(0, 1))
        begin = linears.scatter(initial.slots.expand(batch, -1, -1).flatten(0, 1))
        keys = []
        for n in range(segments.num_segments):
            rows = torch.where(starts[:, n], begin, rows)
            fresh = torch.where(starts[:, n], initial.fresh, fresh)
            q, k, v = (part.unflatten(0, (batch, num_slots)) for part in block.project(rows))
            q, k = self._rotate(q, k, n, segments)
            here = n + self.memory.window
            attended = segments.sequence.fold_slots(
                q, tokens.k[:, here], tokens.v[:, here], slots=(k, v)
            )
            residual = torch.where(fresh, 0.0, rows)
            rows = self._carry(block.finish(residual, attended.flatten(0, 1)))
            fresh = torch.zeros_like(fresh)
            keys.append((k, v))
        slots = linears.gather(rows).unflatten(0, (batch, num_slots))
        slot_k, slot_v = (torch.stack(parts, 1) for parts in zip(*keys, strict=True))
        return (slot_k, slot_v), slots, torch.zeros_like(state.fresh)

    def _rotate(self, q: Tensor, k: Tensor, n: int, segments: Segments) -> tuple[Tensor, Tensor]:
        """Place the slots at the end of segment n-1, and their queries there or at the end of n."""
        assert segments.slot_cos is not None and segments.slot_sin is not None
        asks = n + 1 if self.memory.query_position == "current" else n
        cos, sin = segments.slot_cos.unsqueeze(-2), segments.slot_sin.unsqueeze(-2)
        return rotate(q, cos[asks], sin[asks]), rotate(k, cos[n], sin[n])

    def _carry(self, rows: Tensor) -> Tensor:
        """Return what is fed back of the block's output rows, in their type."""
        match self.memory.state:
            case "paper":
                return rows
            case "norm":
                return normalise(rows, self.eps) * self.gain.to(rows.dtype)
            case "latch":
                bounded = torch.tanh(self.memory.beta * normalise(rows, self.eps))
                return bounded * self.gain.to(rows.dtype)

    def empty(self, block: Block, segments: Segments, like: Tensor) -> FamState:
        """Return slots that hold nothing yet."""
        wide = torch.promote_types(like.dtype, torch.float32)
        shape = (segments.batch, self.memory.slots, block.hidden_size)
        return FamState(
            torch.zeros(shape, device=like.device, dtype=wide),
            torch.ones_like(segments.starts[:, 0]),
            empty_window(self.memory.window, segments, block, like),
        )

    def alone(self, block: Block, x: Tensor) -> Tensor:
        """Return the block's output for the prompt rows x [rows, D], which read one another."""
        q, k, v = block.project(x)
        positions = torch.arange(q.shape[0])
        cos, sin = rope_tables(positions, block.head_dim, self.rope_base, x)
        q, k = (rotate(part, cos.unsqueeze(1), sin.unsqueeze(1)) for part in (q, k))
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return block.finish(x, out.squeeze(0).transpose(0, 1))


class Fam(nn.Module):
    """The prompt whose way through the layers gives each layer its first slots.

    The rows run alone, before any token: a layer's first slots are the prompt as that layer gets
    it. (Were they updated by segment 1 on the way, its tokens would see their own future.)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert isinstance(config.memory, FamMemory)
        self.config, self.memory = config, config.memory
        self.slots: int = self.memory.slots
        self.prompt = nn.Parameter(torch.empty(self.slots, config.hidden_size))

    def mixer(self) -> Mixer:
        """Return the block's part."""
        return FamMixer(self.config, self.memory)

    def initial(self, blocks: Items[Block], linears: Linears) -> list[FamInitial]:
        """Return the slots each layer begins a document with."""
        wide = torch.promote_types(self.prompt.dtype, torch.float32)
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
