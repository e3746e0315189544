"""Landmark attention (Mohtashami & Jaggi 2023, arXiv 2305.16300): a token closes each block.

The last position of every block of keys is a landmark. A query reads its own block token by token,
and every earlier block through its landmark: the landmark's score is the block's weight, the
block's own softmax says what is read in it. Blocks lie inside segments and inside ranks' slices.

With `retrieve`, blocks that have left the window are kept, and each query reads the best of them
(see retrieval): memory grows with the document, a block of keys at a time, on the host.

With `layers` last only the top layer looks beyond its segment. Below it segments are independent
then, and as no layer reads what the top one found, a document is read without any search.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.config import LandmarkMemory, ModelConfig
from model.interfaces import Linears, Segments
from model.memory.base import Block, Initial, Part, PartMemory, Tokens
from model.memory.block_store import BlockStore, append, empty_store, forget
from model.memory.grouped import GroupedKernel
from model.memory.layered import Layered
from model.memory.mixer import LocalMixer, Mixer
from model.memory.retrieval import Retrieved, in_blocks, retrieve


class StoresRead(NamedTuple):
    """The stores that the tokens of each segment read."""

    stores: list[BlockStore]


class RetrievalPart(Part):
    """The blocks of one layer that left its window."""

    def __init__(self, memory: LandmarkMemory, linears: Linears) -> None:
        super().__init__()
        if memory.granularity == "heads" and linears.size > 1:
            raise ValueError(
                f"landmark.granularity=heads chooses over all heads, and tp={linears.size} has them"
                " on several ranks; use token_and_head or tokens, or parallel.tp=1"
            )
        self.memory = memory

    def empty(self, block: Block, segments: Segments, like: Tensor) -> BlockStore:
        """Return a store without blocks."""
        if segments.sequence.size > 1:
            raise ValueError(
                f"landmark.retrieve={self.memory.retrieve} keeps whole segments, and"
                f" cp={segments.sequence.size} has them on several ranks; use parallel.cp=1"
            )
        key = like.new_empty(0, block.head_dim)
        return empty_store(segments.batch, block.num_kv_heads, self.memory.block, key)

    def open(
        self, block: Block, segments: Segments, n: int, state: BlockStore, initial: Initial
    ) -> tuple[BlockStore, None]:
        """Return the store, its blocks hidden where a document starts."""
        return forget(state, segments.starts[:, n]), None

    def close(
        self,
        block: Block,
        segments: Segments,
        n: int,
        opened: BlockStore,
        rest: None,
        tokens: Tokens,
    ) -> BlockStore:
        """Put the segment that leaves the window into the store."""
        belongs = tokens.age[:, n] >= segments.window
        k = in_blocks(tokens.raw_k[:, n], self.memory.block, segments.rope)
        return append(opened, k, tokens.v[:, n], belongs=belongs)

    def chain(
        self,
        block: Block,
        segments: Segments,
        tokens: Tokens,
        state: BlockStore,
        initial: Initial,
    ) -> tuple[StoresRead, BlockStore]:
        """Return the store before each segment, and after the last."""
        found = []
        for n in range(segments.num_segments):
            opened, rest = self.open(block, segments, n, state, initial)
            found.append(opened)
            if segments.filled is None:
                state = self.close(block, segments, n, opened, rest, tokens)
        return StoresRead(found), state

    def other(self, segments: Segments, opened: StoresRead, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each segment's queries read of the store before it."""
        found = self.retrieved(segments, opened, q)
        missing = segments.segment_len - found[0].lse.shape[-1]
        out = torch.stack([past.out.transpose(1, 2) for past in found], 1)
        lse = torch.stack([past.lse for past in found], 1)
        out = functional.pad(out, (0, 0, 0, 0, 0, missing))
        return out, functional.pad(lse, (0, missing), value=float("-inf"))

    def retrieved(self, segments: Segments, opened: StoresRead, q: Tensor) -> list[Retrieved]:
        """Return what each segment's queries [B, N, S, H, K], not rotated, find, and where."""
        count = segments.filled or segments.segment_len  # padding must choose no block
        places = segments.window * segments.segment_len + torch.arange(count)
        return [
            retrieve(
                q[:, n, :count],
                store,
                top_k=self.memory.retrieve,
                places=places,
                rope=segments.rope,
                granularity=self.memory.granularity,
            )
            for n, store in enumerate(opened.stores)
        ]


class Retrieval(PartMemory):
    """Nothing is shared over the layers."""

    def __init__(self, config: ModelConfig, memory: LandmarkMemory) -> None:
        super().__init__()
        self.memory = memory

    def part(self, config: ModelConfig, linears: Linears) -> Part:
        """Return one layer's blocks."""
        return RetrievalPart(self.memory, linears)


class Landmark(Layered):
    """The keys of window and segment, grouped by landmarks, and blocks retrieved from before."""

    packs = False  # documents would have to begin and end with a block

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert isinstance(config.memory, LandmarkMemory)
        self.kernel = GroupedKernel(config.memory.block)
        self.all_layers = config.memory.layers == "all"

    def mixer(self, config: ModelConfig, linears: Linears, layer: int) -> Mixer:
        """Return the memory of one block: of the lower ones none, where only the top has one."""
        if self.all_layers or layer == config.num_layers - 1:
            return super().mixer(config, linears, layer)
        return LocalMixer({}, config, self.kernel)

    def made_of(self, config: ModelConfig) -> dict[str, PartMemory]:
        """Return the store of blocks, if any are retrieved."""
        assert isinstance(config.memory, LandmarkMemory)
        return {"store": Retrieval(config, config.memory)} if config.memory.retrieve else {}
