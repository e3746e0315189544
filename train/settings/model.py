"""The model section of a run's configuration: what the decoder is, and what its memory is."""

from pathlib import Path

from pydantic import Field

from train.settings.lora import LoraSection
from train.settings.memories import Memory, NoMemory
from train.settings.pretrained_keys import RopeScalingSection
from train.settings.units import Count, Positive, Section, TokenLength


class ModelSection(Section):
    """The decoder: its sizes and its memory. A checkpoint loads only into the same one."""

    vocab_size: Count | None = Field(
        default=None,
        description="Tokens in the vocabulary. Leave it out to take it from the prepared data;"
        " it is padded to a multiple of 64 by itself.",
    )
    num_layers: Count = Field(description="Decoder blocks, one after the other.")
    hidden_size: Count = Field(description="Width of the residual stream.")
    num_heads: Count = Field(description="Query heads of each attention; a multiple of tp.")
    num_kv_heads: Count = Field(
        description="Key and value heads. num_heads for ordinary attention; fewer (a divisor of"
        " num_heads) makes caches and ring traffic smaller, at little cost in quality.",
    )
    head_dim: Count | None = Field(
        default=None,
        description="Width of one head, even for the rotary embedding. Leave it out for"
        " hidden_size / num_heads.",
    )
    ffn_size: Count = Field(
        description="Inner width of the gated feed-forward layer; about 8/3 of hidden_size.",
    )
    rope_base: Positive = Field(
        default=10000.0,
        description="Base of the rotary position embedding. Raise it with segment_len (500000"
        " for 128k and more), or distant positions look alike.",
    )
    rope_scaling: RopeScalingSection = Field(
        default_factory=RopeScalingSection,
        description="How rotary frequencies were slowed down, where the model's were.",
    )
    qkv_bias: bool = Field(
        default=False,
        description="Add a learned bias to queries, keys and values, as Qwen2 does.",
    )
    sliding_window: TokenLength | None = Field(
        default=None,
        description="Keys that a token reads, itself counted, in the model that weights were"
        " imported from (Mistral 7B v0.1: 4096). It changes no number here: segment_len *"
        " (1 + window) is held below it, where it cuts nothing. Left out, no limit. Units: 4k.",
    )
    norm_eps: Positive = Field(
        default=1e-5, description="Added under the square root of every RMSNorm."
    )
    tie_embeddings: bool = Field(
        default=False,
        description="Use the embedding's matrix as the output layer too. Saves vocab_size *"
        " hidden_size parameters; worth it for small models only.",
    )
    init_std: Positive = Field(
        default=0.02,
        description="Standard deviation of the initial weights; residual outputs are scaled"
        " down with depth on top of it.",
    )
    memory: Memory = Field(
        default_factory=lambda: NoMemory(name="none"),
        description="What carries the past from segment to segment. Give its name and only the"
        " keys of that memory, or its name alone; or a list of several, such as [window, infini].",
    )
    init_from: Path | None = Field(
        default=None,
        description="Checkpoint, or run folder for its newest, whose weights a new run starts"
        " from, at any layout; a memory that it lacks starts from the seed. Step, optimizer and"
        " data begin anew. Not read once the run has a checkpoint of its own.",
    )
    lora: LoraSection | None = Field(
        default=None,
        description="Train low-rank adapters instead of the weights of init_from. Left out, all"
        " weights are trained.",
    )
