"""Associative RMT (Rodkin et al. 2024, 2407.04841): memory rows write a matrix in every layer.

m rows stand behind each segment's tokens. What they are after a layer is written into the layer's
matrix by the delta rule; before the layer, every row of the next segment reads the matrix and adds
what it finds. The memory of a layer depends on that layer alone.

Keys are DPFP-3 features (Schlag et al. 2021): positive and sparse. The norm z grows only by what is
new in a key, so writing one twice does not halve what it holds. Queries, keys and values are maps
of the row normalised: the residual stream's scale grows with depth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ArmtMemory, ModelConfig
from model.interfaces import Linears, Segments
from model.layers import normalise, scattered
from model.memory.base import Block, Initial
from model.memory.frame import Frame, Rows
from model.memory.in_turn import InTurn, Stack
from model.memory.mixer import Mixer, MixerState
from model.memory.scan import where_start

ROLLS = 3
"""nu of DPFP: feature i of a key is a product of entries i and i - 1, i - 2, i - 3."""


class ArmtState(NamedTuple):
    """A layer's matrix and norm, float32 or wider."""

    matrix: Tensor  # [B, D, P]
    norm: Tensor  # [B, P]


def features(x: Tensor) -> Tensor:
    """Return DPFP features: x [..., d] -> [..., 2 * ROLLS * d]."""
    both = torch.relu(torch.cat((x, -x), -1))
    return torch.cat([both * both.roll(j, -1) for j in range(1, ROLLS + 1)], -1)


class ArmtMixer(Mixer):
    """Attention with the layer's matrix read before and written after."""

    def __init__(self, config: ModelConfig, memory: ArmtMemory) -> None:
        super().__init__({}, config.rope_base)
        self.eps, self.features = config.norm_eps, 2 * ROLLS * memory.key_dim

        def map_to(size: int) -> nn.Linear:
            linear = nn.Linear(config.hidden_size, size, bias=False)
            scattered(linear.weight)
            return linear

        self.query, self.key = map_to(memory.key_dim), map_to(memory.key_dim)
        self.value, self.strength = map_to(config.hidden_size), map_to(1)

    def mix(
        self,
        block: Block,
        x: Tensor,
        rows: Rows | None,
        segments: Segments,
        state: MixerState,
        initial: Initial,
    ) -> tuple[Tensor, Rows | None, MixerState]:
        """Read, attend, write; for one segment (N = 1)."""
        assert rows is not None
        start = segments.starts[:, 0]
        memory = ArmtState(*(where_start(start, torch.zeros_like(m), m) for m in state.parts[0]))
        x = self.read(x, memory, segments.length, segments.linears)
        rows = rows._replace(x=self.read(rows.x, memory, rows.frame.rows, segments.linears))
        x, rows, after = super().mix(block, x, rows, segments, state._replace(parts=[]), [])
        assert rows is not None
        return x, rows, after._replace(parts=[self.write(rows, memory, segments)])

    def empty(self, block: Block, segments: Segments, like: Tensor) -> MixerState:
        """Return a matrix of nothing."""
        wide = torch.promote_types(like.dtype, torch.float32)
        shape = (segments.batch, block.hidden_size, self.features)
        matrix = torch.zeros(shape, device=like.device, dtype=wide)
        state = super().empty(block, segments, like)
        return state._replace(parts=[ArmtState(matrix, matrix[:, 0])])

    def read(self, x: Tensor, memory: ArmtState, per_stream: int, linears: Linears) -> Tensor:
        """Return rows x [rows, D] with what each finds added.

        A stream has per_stream rows one after the other; this rank may hold a part of them.
        """
        asked = features(self.query(self._normed(x)).to(memory.norm.dtype))
        if linears.scattered == 1:
            found = self._find(asked.unflatten(0, (-1, per_stream)), memory).flatten(0, 1)
            return x + found.to(x.dtype)
        first, end, parts = linears.rank * len(x), (linears.rank + 1) * len(x), []
        while first < end:  # stream by stream
            stream = first // per_stream
            after = min((stream + 1) * per_stream, end)
            rows = slice(first - linears.rank * len(x), after - linears.rank * len(x))
            one = ArmtState(*(m[stream : stream + 1] for m in memory))
            parts.append(self._find(asked[rows].unsqueeze(0), one).squeeze(0))
            first = after
        return x + torch.cat(parts).to(x.dtype)

    def write(self, rows: Rows, memory: ArmtState, segments: Segments) -> ArmtState:
        """Return the memory with the rows' keys and values written, the delta rule for all rows."""
        x = self._normed(rows.x)
        made = torch.cat((self.key(x), self.value(x), self.strength(x)), -1)
        wide = segments.linears.share(made).to(memory.norm.dtype)
        sizes = (self.key.out_features, self.value.out_features, 1)
        key, value, strength = wide.unflatten(0, (segments.batch, -1)).split(sizes, -1)
        phi = features(key)  # [B, m, P]
        held = self._find(phi, memory)
        known = (phi @ memory.norm.unsqueeze(-1)).squeeze(-1)
        new = (1 - known / phi.square().sum(-1).clamp(min=1e-6)).clamp(0, 1)
        change = torch.sigmoid(strength) * (value - held)
        return ArmtState(
            memory.matrix + change.transpose(1, 2) @ phi,
            memory.norm + (new.unsqueeze(-1) * phi).sum(1),
        )

    def _find(self, phi: Tensor, memory: ArmtState) -> Tensor:
        """Return the values held under keys: phi [B, rows, P] -> [B, rows, D]."""
        norm = (phi @ memory.norm.unsqueeze(-1)).clamp(min=1e-6)
        return (phi @ memory.matrix.transpose(1, 2)) / norm

    def _normed(self, x: Tensor) -> Tensor:
        return normalise(x, self.eps).to(self.query.weight.dtype)


class Armt(InTurn):
    """The rows that stand behind every segment."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert isinstance(config.memory, ArmtMemory)
        self.memory = config.memory
        self.frame = Frame(back=self.memory.slots)
        self.rows = nn.Parameter(torch.empty(self.memory.slots, config.hidden_size))

    def mixer(self, config: ModelConfig, linears: Linears) -> Mixer:
        """Return a layer's attention and matrix."""
        return ArmtMixer(config, self.memory)

    def empty(self, batch: int, like: Tensor) -> list[Tensor]:
        """Return nothing: the layers carry it."""
        return []

    def open(
        self, stack: Stack, segments: Segments, n: int, state: list[Tensor], prepared: None
    ) -> tuple[Rows, None]:
        """Return the rows."""
        wide = torch.promote_types(self.rows.dtype, torch.float32)
        x = self.rows.to(wide).expand(segments.batch, -1, -1).flatten(0, 1)
        return Rows(self.frame, stack.linears.scatter(x)), None

    def close(self, stack: Stack, segments: Segments, rows: Rows, rest: None) -> list[Tensor]:
        """Return nothing."""
        return []
