"""What a model is: shapes and its memory. Plain frozen dataclasses; bad values raise ValueError."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

VOCAB_MULTIPLE = 64
"""The embedding is padded to a multiple of this, whatever the layout, so that every TP size that
divides 64 holds the same weights. Padded columns take no probability."""


@dataclass(frozen=True)
class NoMemory:
    """Attention inside the segment only."""

    name: Literal["none"] = "none"


@dataclass(frozen=True)
class WindowMemory:
    """Block sliding window attention: the keys of the last `segments` segments as well."""

    segments: int = 1
    name: Literal["window"] = "window"


@dataclass(frozen=True)
class FamMemory:
    """TransformerFAM (Hwang et al. 2024): `slots` rows a layer, fed back segment by segment."""

    slots: int = 64
    window: int = 0
    state: Literal["paper", "norm", "latch"] = "norm"
    beta: float = 2.0
    query_position: Literal["current", "previous"] = "current"
    name: Literal["fam"] = "fam"


MemoryConfig = NoMemory | WindowMemory | FamMemory


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-style decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    head_dim: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    memory: MemoryConfig = field(default_factory=NoMemory)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd: RoPE rotates pairs; use an even one"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to VOCAB_MULTIPLE."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def window(self) -> int:
        """Previous segments whose keys a token also reads."""
        match self.memory:
            case WindowMemory(segments=segments):
                return segments
            case FamMemory(window=window):
                return window
            case _:
                return 0


@dataclass(frozen=True)
class ComputeConfig:
    """How the same numbers are computed: what is recomputed, and in what pieces."""

    checkpointing: Literal["none", "selective", "block"] = "none"
    loss_chunk: int = 1024
    ffn_chunk: int | None = None
