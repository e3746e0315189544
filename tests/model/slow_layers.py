"""Slow twins of memories that live inside a layer: they add keys, or blend a read in."""

import torch
from torch import Tensor
from torch.nn import functional

from model.config import (
    AbcMemory,
    CmabMemory,
    ComposedMemory,
    InfiniMemory,
    LandmarkMemory,
    ModelConfig,
)
from tests.model.slow import Raw, Read, Slow, causal


class Part:
    """One memory in one layer of one document."""

    def __init__(self, slow: Slow, layer: int, memory: object) -> None:
        self.slow, self.config = slow, slow.config
        self.name = f"blocks.{layer}.mixer.parts.{memory.name}"  # type: ignore[attr-defined]

    def reads(self, queries: int, end: int) -> list[Read]:
        """Return what every token reads; end: the place after the segment before."""
        return []

    def blend(self, q: Tensor, attended: Tensor) -> Tensor:
        """q [S, H, K], not rotated."""
        return attended

    def write(self, raw: Raw, count: int) -> None:
        """Write a segment `count` times."""
        raise NotImplementedError


class SlowInfini(Part):
    """The paper's equations, one head at a time, one segment after the other."""

    def __init__(self, slow: Slow, layer: int, memory: InfiniMemory) -> None:
        super().__init__(slow, layer, memory)
        self.rule, size = memory.rule, slow.config.head_dim
        self.gate = slow.weights[f"{self.name}.gate"]
        zero = self.gate.new_zeros
        self.m = [zero(size, size) for _ in range(slow.config.num_kv_heads)]
        self.z = [zero(size) for _ in range(slow.config.num_kv_heads)]
        self.written = False

    def blend(self, q: Tensor, attended: Tensor) -> Tensor:
        group = self.config.num_heads // self.config.num_kv_heads
        heads = []
        for h in range(self.config.num_heads):
            asked, kv = functional.elu(q[:, h]) + 1, h // group
            if self.written:
                memory = (asked @ self.m[kv]) / (asked @ self.z[kv])[:, None]
            else:
                memory = torch.zeros_like(attended[:, h])
            g = torch.sigmoid(self.gate[h])
            heads.append(g * memory + (1 - g) * attended[:, h])
        return torch.stack(heads, 1)

    def write(self, raw: Raw, count: int) -> None:
        for kv in range(self.config.num_kv_heads):
            keys, values = functional.elu(raw.k[:, kv]) + 1, raw.v[:, kv]
            if self.rule == "delta" and self.written:
                values = values - (keys @ self.m[kv]) / (keys @ self.z[kv])[:, None]
            for _ in range(count):
                self.m[kv] = self.m[kv] + keys.T @ values
                self.z[kv] = self.z[kv] + keys.sum(0)
        self.written = True


class SlowSlots(Part):
    """A softmax over everything read, written out at every segment."""

    def __init__(self, slow: Slow, layer: int, memory: AbcMemory | CmabMemory) -> None:
        super().__init__(slow, layer, memory)
        self.past: list[Raw] = []

    def scores(self, raw: Raw) -> Tensor:
        """[T, Hkv, m]."""
        raise NotImplementedError

    def reads(self, queries: int, end: int) -> list[Read]:
        if not self.past:
            return []
        k, v = self.slots()
        places = torch.full((len(k),), end - 1)
        mask = torch.ones(queries, len(k), dtype=torch.bool)
        return [Read(self.slow.rotate(k, places), v, mask)]

    def slots(self) -> tuple[Tensor, Tensor]:
        """Return the means of all keys and of all values so far: [m, Hkv, K]."""
        raw = Raw(*(torch.cat(parts) for parts in zip(*self.past, strict=True)))
        shares = self.scores(raw).softmax(0)
        k, v = (torch.einsum("thm,thk->mhk", shares, x) for x in (raw.k, raw.v))
        return k, v

    def write(self, raw: Raw, count: int) -> None:
        self.past += [raw] * count


class SlowAbc(SlowSlots):
    def scores(self, raw: Raw) -> Tensor:
        return raw.extra.clamp(-32, 32)


class SlowCmab(SlowSlots):
    def scores(self, raw: Raw) -> Tensor:
        latents = self.slow.weights[f"{self.name}.latents"]
        return torch.einsum("thk,hmk->thm", raw.k, latents) / self.config.head_dim**0.5


PARTS: dict[type, type[Part]] = {
    InfiniMemory: SlowInfini,
    AbcMemory: SlowAbc,
    CmabMemory: SlowCmab,
}


class InLayers(Slow):
    """Parts side by side in every layer, and the window."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        super().__init__(config, weights)
        memory = config.memory
        memories = memory.parts if isinstance(memory, ComposedMemory) else (memory,)
        self.parts = [
            [PARTS[type(m)](self, layer, m) for m in memories if type(m) in PARTS]
            for layer in range(config.num_layers)
        ]

    def logits(self, tokens: Tensor) -> Tensor:
        past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.config.num_layers)]
        rows = []
        for n, segment in enumerate(tokens):
            x = self.embed(segment)
            for layer in range(self.config.num_layers):
                x = self.block(layer, x, past[layer], n)
            rows.append(self.head(x))
        return torch.stack(rows)

    def block(self, layer: int, x: Tensor, past: list[tuple[Tensor, Tensor]], n: int) -> Tensor:
        length, parts = len(x), self.parts[layer]
        places = torch.arange(n * length, (n + 1) * length)
        raw = self.project(layer, x)
        own = Read(self.rotate(raw.k, places), raw.v, causal(length))
        reads = [read for part in parts for read in part.reads(length, n * length)]
        reads += [*self.window(past, length), own]
        attended = self.attend(self.rotate(raw.q, places), reads)
        for part in parts:
            attended = part.blend(raw.q, attended)
            part.write(raw, self.counts[n] if self.counts else 1)
        past.append((own.k, own.v))
        return self.finish(layer, x, attended)


class SlowLandmark(InLayers):
    """The paper's grouped softmax over the window's keys and the segment's, one row at a time."""

    def attend(self, q: Tensor, reads: list[Read]) -> Tensor:
        assert isinstance(self.config.memory, LandmarkMemory)
        block, group = self.config.memory.block, self.config.num_heads // self.config.num_kv_heads
        k, v = torch.cat([read.k for read in reads]), torch.cat([read.v for read in reads])
        rows, before = [], len(k) - len(q)  # keys before the segment: whole blocks
        for i in range(len(q)):
            heads = [
                self.row(q[i, h] @ k[:, h // group].T, before + i, block) @ v[:, h // group]
                for h in range(self.config.num_heads)
            ]
            rows.append(torch.stack(heads))
        return torch.stack(rows)

    def row(self, products: Tensor, at: int, block: int) -> Tensor:
        """Return the weight that the query at place `at` has for each key."""
        scores, own = products / self.config.head_dim**0.5, at // block
        local = [j for j in range(own * block, at + 1) if j % block != block - 1]
        gates = [b * block + block - 1 for b in range(own)]
        shared = torch.exp(scores[local + gates])
        shared = shared / shared.sum()
        weights = {j: shared[i] for i, j in enumerate(local)}
        for b in range(own):
            inside = torch.exp(scores[b * block : (b + 1) * block - 1])
            for j, r in enumerate(inside / inside.sum()):
                weights[b * block + j] = shared[len(local) + b] * r
        zero = torch.zeros((), dtype=scores.dtype)
        return torch.stack([weights.get(j, zero) for j in range(len(scores))])
