"""What a model is: shapes and its memory. Plain frozen dataclasses; bad values raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

VOCAB_MULTIPLE = 64
"""The embedding is padded to a multiple of this, whatever the layout, so that every TP size that
divides 64 holds the same weights. Padded columns take no probability."""

FP8_MULTIPLE = 16
"""What a GPU's FP8 products want features to be a multiple of."""


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
    first: Literal["prompt", "hidden"] = "prompt"
    name: Literal["fam"] = "fam"


@dataclass(frozen=True)
class InfiniMemory:
    """Infini-attention (Munkhdalai et al. 2024): a matrix a head, read beside attention."""

    rule: Literal["linear", "delta"] = "linear"
    gate_init: float = 0.0
    gate_lr: float = 10.0
    window: int = 0
    name: Literal["infini"] = "infini"


@dataclass(frozen=True)
class AbcMemory:
    """Attention with bounded-memory control (Peng et al. 2022): `slots` running means a head."""

    slots: int = 64
    window: int = 0
    name: Literal["abc"] = "abc"


@dataclass(frozen=True)
class CmabMemory:
    """Constant memory (Feng et al. 2023): learned latents that read all past segments."""

    latents: int = 64
    window: int = 0
    name: Literal["cmab"] = "cmab"


@dataclass(frozen=True)
class RmtMemory:
    """Recurrent Memory Transformer (Bulatov et al. 2022): rows from the top back to the bottom."""

    slots: int = 16
    mask: Literal["paper", "causal"] = "paper"
    state: Literal["paper", "norm", "latch"] = "paper"
    beta: float = 2.0
    offset: bool = False
    window: int = 0
    name: Literal["rmt"] = "rmt"


@dataclass(frozen=True)
class ArmtMemory:
    """Associative RMT (Rodkin et al. 2024): memory rows write a matrix in every layer."""

    slots: int = 16
    key_dim: int = 64
    window: int = 0
    name: Literal["armt"] = "armt"


@dataclass(frozen=True)
class HmtMemory:
    """Hierarchical Memory Transformer (He et al. 2024): a bank of memories, searched by summary."""

    bank: int = 300
    sensory: int = 32
    search_dim: int = 64
    search_from: int | None = 0  # None: never, as a checkpoint from before it was trained
    window: int = 0
    name: Literal["hmt"] = "hmt"


@dataclass(frozen=True)
class LandmarkMemory:
    """Landmark attention (Mohtashami & Jaggi 2023): blocks gated by the token that closes them."""

    block: int = 64
    window: int = 0
    retrieve: int = 0
    granularity: Literal["token_and_head", "heads", "tokens"] = "token_and_head"
    layers: Literal["all", "last"] = "all"
    name: Literal["landmark"] = "landmark"


PartConfig = FamMemory | InfiniMemory | AbcMemory | CmabMemory
"""Memories that live inside a layer and add to its attention: any of them compose."""


@dataclass(frozen=True)
class ComposedMemory:
    """Several memories side by side in each layer, with one window; see compose."""

    parts: tuple[PartConfig, ...]
    window: int = 0
    name: Literal["composed"] = "composed"


MemoryConfig = (
    NoMemory
    | WindowMemory
    | PartConfig
    | RmtMemory
    | ArmtMemory
    | HmtMemory
    | LandmarkMemory
    | ComposedMemory
)


def compose(memories: Items[MemoryConfig]) -> MemoryConfig:
    """Return one memory that is all of these; ValueError where that has no meaning.

    A window joins any memory: tokens read its keys too. Memories inside a layer join one another:
    each adds keys or a read to the layer's attention.
    """
    names = [memory.name for memory in memories]

    def refuse(why: str) -> ValueError:
        return ValueError(f"memory {names}: {why}")

    if not memories:
        raise refuse("nothing is named; use none")
    if len(set(names)) < len(names):
        raise refuse("a memory is named twice; name each once")
    if "none" in names and len(names) > 1:
        raise refuse("none joins no other memory; leave it out")
    windows = [memory.segments for memory in memories if isinstance(memory, WindowMemory)]
    rest = [memory for memory in memories if not isinstance(memory, WindowMemory | NoMemory)]
    if not rest:
        return memories[0]
    windows += [memory.window for memory in rest if memory.window]
    if len(windows) > 1:
        raise refuse("more than one sets a window; set it once, by window.segments")
    window = windows[0] if windows else 0
    if len(rest) == 1:
        return replace(rest[0], window=window)
    parts = []
    for memory in rest:
        if not isinstance(memory, PartConfig):
            why = ALONE.get(memory.name, "it is made of several already")
            raise refuse(f"{why}; name {memory.name} alone, or with window")
        parts.append(replace(memory, window=0))
    return ComposedMemory(tuple(parts), window)


ALONE = {
    "rmt": "rmt carries rows from the top of the stack to its bottom, past every layer's memory",
    "armt": "armt adds its memory before a layer's attention, where other memories have no part",
    "hmt": "hmt carries rows from the top of the stack to its bottom, past every layer's memory",
    "landmark": "landmark gates every past key itself, and other memories' keys have no landmark",
}
"""Why these compose with a window only."""


LoraTarget = Literal["qkv", "output", "gate_up", "down"]
"""A block's linear maps, by the names that adapters ask for; see model.lora."""

LoraAlso = Literal["norms", "embeddings"]
"""What else may learn beside adapters."""

LORA_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)
LORA_ALSO: tuple[LoraAlso, ...] = get_args(LoraAlso)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) beside frozen weights."""

    rank: int
    alpha: float = 16.0
    targets: tuple[LoraTarget, ...] = LORA_TARGETS
    train_also: tuple[LoraAlso, ...] = ()


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are slowed down, for lengths beyond those first trained on.

    linear divides all by factor (Chen et al. 2023). llama3 divides those that turn fewer than
    low_freq_factor times in original_len tokens, leaves those that turn more than high_freq_factor
    times, and goes from one to the other in between (Grattafiori et al. 2024, as published code).
    """

    type: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192


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
    rope_scaling: RopeScaling = RopeScaling()
    qkv_bias: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    memory: MemoryConfig = field(default_factory=NoMemory)
    lora: LoraConfig | None = None

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
    def landmark(self) -> int | None:
        """Id of the token that closes each block of landmark attention, the last one; or None."""
        return self.vocab_size - 1 if isinstance(self.memory, LandmarkMemory) else None

    @property
    def window(self) -> int:
        """Previous segments whose keys a token also reads."""
        if isinstance(self.memory, WindowMemory):
            return self.memory.segments
        return getattr(self.memory, "window", 0)


@dataclass(frozen=True)
class ComputeConfig:
    """How the same numbers are computed: what is recomputed, and in what pieces."""

    checkpointing: Literal["none", "selective", "block"] = "none"
    loss_chunk: int = 1024
    ffn_chunk: int | None = None
    wavefront: bool = False  # armt: layers at once, each with another segment; see model.wavefront
    fp8: bool = False  # products of the blocks' linear maps; see model.float8
