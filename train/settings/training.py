"""The train section of a run's configuration: steps, optimizer, compute, evaluation inside it."""

from typing import Annotated, Literal

from pydantic import Field

from train.settings.guard import GuardSection
from train.settings.profile import ProfileSection
from train.settings.units import (
    Count,
    Decay,
    Index,
    Names,
    NonNegative,
    Positive,
    Section,
    TokenLength,
    Whole,
)


class CurriculumStage(Section):
    """A part of the training in which documents are short for the memory."""

    until: Count = Field(description="Optimizer step at which the next stage begins.")
    segments: Count = Field(
        description="Segments after which the memory begins anew. At most those of a sample.",
    )


class TrainSection(Section):
    """The optimization: how long, how much at once, and how the learning rate goes."""

    steps: Count = Field(description="Optimizer steps of the whole run, across restarts.")
    batch_size: Count = Field(
        description="Lanes: streams of documents over all ranks, one sample of each per step,"
        " so a step is batch_size * sample_len tokens. A multiple of dp * micro_batch.",
    )
    micro_batch: Count = Field(
        default=1,
        description="Lanes in one forward pass of a rank. More is faster until memory runs out;"
        " the result does not change, the rest of a rank's lanes accumulate.",
    )
    bptt_len: TokenLength | None = Field(
        default=None,
        description="Tokens between detaches of the memory: gradients go back this far. A"
        " multiple of segment_len that divides sample_len; left out, the whole sample.",
    )
    curriculum: tuple[CurriculumStage, ...] = Field(
        default=(),
        description="Stages such as {until: 2000, segments: 1}, in order: until that step every"
        " sample is read as documents of at most so many segments, which a recurrent memory learns"
        " from first. After the last stage documents are whole. Data and compute stay the same.",
    )
    curriculum_vary: bool = Field(
        default=False,
        description="In a stage, draw the number of segments anew each step, from 1 to the"
        " stage's, so that no length is forgotten.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Arithmetic of the layers. bf16 on GPUs (master weights stay fp32); fp32 on"
        " CPU and for comparisons.",
    )
    fp8: bool = Field(
        default=False,
        description="Products of the layers' linear maps in FP8, all else in bf16 (for precision:"
        " bf16; on GPUs from compute capability 8.9 on, such as H100. A CPU computes the same,"
        " slowly). Best with compile, which fuses the rounding.",
    )
    lr: Positive = Field(description="Peak learning rate, after the warmup. Such as 3e-4.")
    min_lr: NonNegative = Field(
        default=0.0, description="Learning rate at the end of a cosine or wsd schedule."
    )
    warmup_steps: Index = Field(
        default=0, description="Steps of linear rise from 0 to lr; fewer than steps."
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine",
        description="After the warmup: cosine falls to min_lr at the last step; wsd stays at lr"
        " and falls in the last decay_steps, so a run can be extended; constant stays at lr.",
    )
    decay_steps: Count | None = Field(
        default=None,
        description="Used by schedule=wsd only, and needed there: the length of the final fall."
        " 10 to 20 % of steps is usual.",
    )
    weight_decay: NonNegative = Field(
        default=0.1,
        description="AdamW's decoupled decay of the matrices; norms have none.",
    )
    beta1: Decay = Field(default=0.9, description="AdamW: decay of the mean of gradients.")
    beta2: Decay = Field(
        default=0.95,
        description="AdamW: decay of the mean of squared gradients. 0.95 recovers from loss"
        " spikes sooner than 0.999.",
    )
    eps: Positive = Field(default=1e-8, description="AdamW: added to the denominator.")
    clip: Positive = Field(
        default=1.0,
        description="Largest norm of the whole gradient; larger ones are scaled down to it.",
    )
    checkpointing: Literal["none", "selective", "block"] = Field(
        default="none",
        description="Activations to recompute in the backward pass. selective: norms and"
        " the product of gate and up, but no matrix product and no attention;"
        " block: everything but block inputs, a third more compute for the least memory.",
    )
    loss_chunk: TokenLength = Field(
        default=1024,
        description="Tokens whose logits exist at once. Memory is loss_chunk * vocab_size;"
        " the result does not change.",
    )
    ffn_chunk: TokenLength | None = Field(
        default=None,
        description="Tokens that a feed-forward layer takes at once; left out, all. Set it when"
        " ffn activations of long segments do not fit; the result does not change.",
    )
    wavefront: bool = Field(
        default=False,
        description="armt: run the layers side by side, each with another segment (diagonals), so N"
        " segments take N + num_layers - 1 calls of a block instead of N * num_layers. For a copy"
        " of the blocks' weights; for segments too short to fill a GPU (a CPU gains nothing).",
    )
    compile: bool = Field(
        default=False,
        description="Fuse norms, rotations, gates and the loss into kernels of their own"
        " (torch.compile), and compile a CPU's attention; on a CPU it needs a C++ compiler. The"
        " first step takes up to a minute longer, once for each machine; results differ by"
        " rounding.",
    )
    max_nonfinite: Index = Field(
        default=3,
        description="Steps in a row that are skipped, each named, before the run stops: their loss"
        " or gradient is not finite, or a spike that guard skips.",
    )
    guard: GuardSection = Field(
        default_factory=GuardSection, description="What is done about bad steps."
    )
    profile: ProfileSection = Field(
        default_factory=ProfileSection, description="Where a step's time and memory go."
    )
    log_every: Count = Field(default=10, description="Steps between lines and metrics.")
    eval_every: Count | None = Field(
        default=None,
        description="Steps between evaluations on data.valid; left out, none during the run.",
    )
    eval_tokens: TokenLength = Field(
        default=1 << 20,
        description="Tokens of data.valid that one evaluation reads. Units: 1M.",
    )
    eval_compare: bool = Field(
        default=True,
        description="Also measure each evaluation with the memory off and shuffled between"
        " documents, and warn where it is not used: three to four times the work. The last"
        " evaluation always does. With it the report in the run's folder is written anew.",
    )
    eval_tasks: Names = Field(
        default=(),
        description="Questions whose answer lies far back, asked at each evaluation that compares,"
        " over documents of 4 and 16 segments: such as [passkey, recall, facts]. All data-parallel"
        " ranks read the same ones. A prompt takes about 10 segments; passkey asks 6 *"
        " eval_prompts, recall 8 *, facts 8 *.",
    )
    eval_prompts: Annotated[int, Field(ge=2), Whole] = Field(
        default=8,
        description="Questions of eval_tasks for each length and place. At least 2: they exchange"
        " their memories. More make the intervals narrower.",
    )
