"""Associative RMT (Rodkin et al. 2024, 2407.04841): memory rows write a matrix in every layer.

m rows stand behind each segment's tokens. What they are after a layer is written into the layer's
matrix by the delta rule; before the layer, every row of the next segment reads the matrix and adds
what it finds. The memory of a layer depends on that layer alone.

Keys are DPFP-3 features (Schlag et al. 2021), positive and sparse, of length 1 at most. Two
departures from the paper, which writes all rows of a segment against the memory before it and
divides by a running norm: rows are written one after the other (as one triangular solve), so no two
similar keys of a segment overshoot; then no step lengthens the matrix, and no norm is needed.
Queries, keys and values are maps of the row normalised: the residual stream grows with depth.
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
from model.memory.mixer import Mixer, MixerState, OpenLayer
from model.memory.scan import where_start
from model.precision import sum_dtype

ROLLS = 3
"""nu of DPFP: feature i of a key is a product of entries i and i - 1, i - 2, i - 3."""


FAINT = 1e-2
"""Added to a key's squared length: one of hardly any features is a weak key, not one that turns
round with every rounding."""


class ArmtState(NamedTuple):
    """A layer's matrix, float32 or wider."""

    matrix: Tensor  # [B, P, D]: features by values


def features(x: Tensor) -> Tensor:
    """Return DPFP features of length 1 at most: x [..., d] -> [..., 6 d]."""
    both = torch.relu(torch.cat((x, -x), -1))
    found = torch.cat([both * both.roll(j, -1) for j in range(1, ROLLS + 1)], -1)
    return found * torch.rsqrt(found.square().sum(-1, keepdim=True) + FAINT)


class ArmtMixer(Mixer):
    """Attention with the layer's matrix read before and written after."""

    def __init__(self, config: ModelConfig, memory: ArmtMemory) -> None:
        super().__init__({}, config)
        self.eps, self.features = config.norm_eps, 2 * ROLLS * memory.key_dim

        def map_to(size: int) -> nn.Linear:
            linear = nn.Linear(config.hidden_size, size, bias=False)
            linear.weight = scattered(nn.Parameter(linear.weight.detach()))
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
        memory = self._begun(segments, state)
        x = self.read(x, memory, segments.length, segments.linears)
        rows = rows._replace(x=self.read(rows.x, memory, rows.frame.rows, segments.linears))
        x, rows, after = super().mix(block, x, rows, segments, state._replace(parts={}), {})
        assert rows is not None
        return x, rows, after._replace(parts={"armt": self.write(rows, memory, segments)})

    def open(
        self,
        block: Block,
        rows: Rows | None,
        segments: Segments,
        state: MixerState,
        initial: Initial,
    ) -> tuple[Rows | None, OpenLayer]:
        """Return what tokens of the next segment read; no row stands before them."""
        _, layer = super().open(block, None, segments, state._replace(parts={}), {})
        return rows, layer._replace(memory=self._begun(segments, state))

    def extend(
        self, block: Block, x: Tensor, segments: Segments, layer: OpenLayer
    ) -> tuple[Tensor, OpenLayer]:
        """Read the matrix, then attend."""
        x = self.read(x, layer.memory, x.shape[0] // segments.batch, segments.linears)
        return super().extend(block, x, segments, layer)

    def _begun(self, segments: Segments, state: MixerState) -> ArmtState:
        held = state.parts["armt"].matrix
        return ArmtState(where_start(segments.starts[:, 0], torch.zeros_like(held), held))

    def empty(self, block: Block, segments: Segments, like: Tensor) -> MixerState:
        """Return a matrix of nothing."""
        wide = sum_dtype(like)
        shape = (segments.batch, self.features, block.hidden_size)
        matrix = torch.zeros(shape, device=like.device, dtype=wide)
        return super().empty(block, segments, like)._replace(parts={"armt": ArmtState(matrix)})

    def read(self, x: Tensor, memory: ArmtState, per_stream: int, linears: Linears) -> Tensor:
        """Return rows x [rows, D] with what each finds added.

        A stream has per_stream rows one after the other; this rank may hold a part of them.
        """
        asked = features(self.query(self._normed(x)).to(memory.matrix.dtype))
        if linears.scattered == 1:
            found: Tensor = (asked.unflatten(0, (-1, per_stream)) @ memory.matrix).flatten(0, 1)
            return x + found.to(x.dtype)
        first, end, parts = linears.rank * len(x), (linears.rank + 1) * len(x), []
        while first < end:  # stream by stream
            stream = first // per_stream
            after = min((stream + 1) * per_stream, end)
            rows = slice(first - linears.rank * len(x), after - linears.rank * len(x))
            parts.append(asked[rows] @ memory.matrix[stream])
            first = after
        return x + torch.cat(parts).to(x.dtype)

    def write(self, rows: Rows, memory: ArmtState, segments: Segments) -> ArmtState:
        """Return the memory with the rows written one after the other by the delta rule.

        Row i changes the matrix by phi_i^T u_i, u_i = b_i (v_i - phi_i M_{i-1}), where M_{i-1} has
        the rows before it: (1 + tril(b phi phi^T, -1)) u = b (v - phi M).
        """
        x = self._normed(rows.x)
        made = torch.cat((self.key(x), self.value(x), self.strength(x)), -1)
        wide = segments.linears.share(made).to(memory.matrix.dtype)
        sizes = (self.key.out_features, self.value.out_features, 1)
        key, value, strength = wide.unflatten(0, (segments.batch, -1)).split(sizes, -1)
        phi, b = features(key), torch.sigmoid(strength)
        earlier = (b * (phi @ phi.transpose(1, 2))).tril(-1)
        change = torch.linalg.solve_triangular(
            earlier, b * (value - phi @ memory.matrix), upper=False, unitriangular=True
        )
        return ArmtState(memory.matrix + phi.transpose(1, 2) @ change)

    def _normed(self, x: Tensor) -> Tensor:
        return normalise(x, self.eps).to(self.query.weight.dtype)


class Armt(InTurn):
    """The rows that stand behind every segment."""

    wavefront = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert isinstance(config.memory, ArmtMemory)
        self.memory = config.memory
        self.frame = Frame(back=self.memory.slots)
        self.rows = nn.Parameter(torch.empty(self.memory.slots, config.hidden_size))

    def mixer(self, config: ModelConfig, linears: Linears, layer: int) -> Mixer:
        """Return a layer's attention and matrix."""
        return ArmtMixer(config, self.memory)

    def empty(self, batch: int, like: Tensor) -> list[Tensor]:
        """Return nothing: the layers carry it."""
        return []

    def open(
        self, stack: Stack, segments: Segments, state: list[Tensor], prepared: None
    ) -> tuple[Rows, None]:
        """Return the rows."""
        wide = sum_dtype(self.rows)
        x = self.rows.to(wide).expand(segments.batch, -1, -1).flatten(0, 1)
        return Rows(self.frame, stack.linears.scatter(x)), None

    def close(self, stack: Stack, segments: Segments, rows: Rows, rest: None) -> list[Tensor]:
        """Return nothing."""
        return []
