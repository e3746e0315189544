"""The sections of a run's configuration: every field, its type, default, unit and meaning.

What one field alone must satisfy is said here; what fields must satisfy together is in
`train.settings.rules`; reading a file into these models is in `train.settings.config`. The model
package has its own plain dataclasses with the same names, so that it needs no pydantic.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer

from data.urls import shown_folder, url_of
from train.settings.guard import GuardSection
from train.settings.lora import LoraSection
from train.settings.memories import Memory, NoMemory
from train.settings.pretrained_keys import RopeScalingSection
from train.settings.profile import ProfileSection
from train.settings.units import (
    ByteSize,
    Count,
    Decay,
    Duration,
    Index,
    Names,
    NonNegative,
    Positive,
    Section,
    TokenLength,
    Whole,
)

# it names a folder, an experiment's run and files, so nothing a shell or a URL would change
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
# a Path folds the // of a URL: data.urls unfolds it
Folder = Annotated[
    Path,
    PlainSerializer(lambda path: url_of(path) or str(path), return_type=str, when_used="json"),
]
NonEmpty = Annotated[str, Field(min_length=1)]


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


class CorpusShare(Section):
    """A corpus of a mixture."""

    path: Folder = Field(description="Folder or URL of prepared training shards.")
    weight: Positive = Field(
        default=1.0,
        description="Share of the tokens read that comes from this corpus, in proportion to the"
        " weights of the others; they need not add up to 1.",
    )
    max_epochs: Count | None = Field(
        default=None,
        description="The most often that any document of this corpus may be read in the whole run"
        " (train.steps); a run that would read more does not start. Left out: no limit.",
    )

    @property
    def name(self) -> str:
        """How messages name it."""
        return shown_folder(self.path)


class DataSection(Section):
    """Where the tokens come from and how documents are cut. Prepare folders with `prepare`."""

    train: Folder | tuple[CorpusShare, ...] = Field(
        description="Folder of prepared training shards (`longhaul prepare` writes it). Or their"
        " URL, http(s)://, s3:// or what else fsspec reads, with cache_dir. Or a list such as"
        " [{path: books, weight: 3}, {path: code, weight: 1, max_epochs: 4}]: a mixture."
    )
    shuffle_shards: Count | None = Field(
        default=None,
        description="Shards whose documents are shuffled together, in an order of shards that is"
        " new in each epoch; memory is then bounded by this many shards a lane. For corpora of"
        " some ten million documents and more. Left out: all documents are shuffled.",
    )
    valid: Folder | None = Field(
        default=None,
        description="Folder or URL of prepared validation shards; needed by eval_every.",
    )
    cache_dir: Path | None = Field(
        default=None,
        description="Folder for shards that come from a URL, on a disk of the node: its ranks share"
        " it, and other runs may.",
    )
    cache_bytes: ByteSize = Field(
        default=64 << 30,
        description="Most that cache_dir may hold; what was used longest ago goes first. At least"
        " the shards that a node reads at once, or they are fetched again. Units: 200G, 2T.",
    )
    fetch_attempts: Count = Field(
        default=10,
        description="Times that a file of a URL is asked for, with growing pauses of up to 30 s,"
        " before the run stops.",
    )
    fetch_timeout_s: Duration = Field(
        default=60.0, description="Seconds without a byte after which an attempt has failed."
    )
    segment_len: TokenLength = Field(
        description="Tokens (S) in a segment: what attention sees at once, and the step of the"
        " memory. Split over cp ranks, so a multiple of 2 * cp (zigzag). Units: 16k = 16384.",
    )
    sample_len: TokenLength = Field(
        description="Tokens of a stream that one optimizer step consumes: a multiple of"
        " segment_len. Longer samples let gradients reach further back, see bptt_len.",
    )
    packing: bool = Field(
        default=False,
        description="Fill what a document leaves of its last segment with whole short documents."
        " None of them sees another, in attention or memory; only the padding goes. For corpora"
        " of documents shorter than segment_len; not with rmt, armt, hmt and landmark.",
    )
    workers: Index = Field(
        default=1,
        description="Background readers of each rank; they prefetch and never change the order."
        " 0 reads in the training thread.",
    )
    on_damage: Literal["stop", "skip"] = Field(
        default="stop",
        description="What to do about a damaged shard or document: stop with its name, or leave"
        " it out, name it and go on.",
    )


class ParallelSection(Section):
    """How ranks share the work: world = tp * cp * dp; dp follows from the rank count."""

    tp: Count = Field(
        default=1,
        description="Tensor parallel ranks: each holds 1/tp of every layer. Keep it inside one"
        " node, it talks in every layer.",
    )
    cp: Count = Field(
        default=1,
        description="Context parallel ranks: each holds 1/cp of every segment. Raise it when a"
        " segment's activations do not fit.",
    )
    zero: Literal[1, 2, 3] = Field(
        default=1,
        description="DeepSpeed ZeRO stage over dp * cp ranks: 1 shards optimizer state, 2 also"
        " gradients, 3 also parameters. Each saves memory, and 3 costs communication.",
    )
    sequence_parallel: bool = Field(
        default=True,
        description="With tp > 1, also shard activations between the layers over tp ranks."
        " Same result, less memory; leave it on unless debugging.",
    )
    layout: Literal["zigzag", "contiguous"] = Field(
        default="zigzag",
        description="Which tokens of a segment a cp rank holds. zigzag gives each rank an early"
        " and a late chunk, so causal work is even; contiguous only halves the constraint on"
        " segment_len.",
    )
    attention: Literal["ring", "all_gather"] = Field(
        default="ring",
        description="How cp ranks see each other's keys. ring sends them round while computing;"
        " all_gather is faster for small cp or short segments and holds all keys at once.",
    )
    timeout_s: Duration = Field(
        default=1800.0,
        description="Seconds without progress after which the job ends as hung, until two steps"
        " were measured; and always while it reads data, saves or evaluates. At least hang_factor"
        " times the step that `longhaul plan` expects. Units: 30min. Raise it if the first step"
        " compiles or reads for longer.",
    )
    hang_factor: Annotated[Positive, Field(gt=1)] = Field(
        default=5.0,
        description="Then a step may be without progress for this many times the slowest of the"
        " last 50 steps.",
    )
    hang_floor_s: Duration = Field(
        default=300.0,
        description="And never less than these seconds: what a network file system may be away.",
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
        " (torch.compile; on a CPU it needs a C++ compiler). The first step takes up to a minute"
        " longer, once for each machine; results differ by rounding.",
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


class CheckpointSection(Section):
    """What is kept to go on from. A run always resumes from its newest good checkpoint."""

    every: Count = Field(
        default=500, description="Steps between checkpoints; a crash loses at most this many."
    )
    keep: Annotated[int, Field(ge=2), Whole] = Field(
        default=2,
        description="Newest checkpoints kept. At least 2: a damaged one needs a fallback.",
    )
    keep_every: Count | None = Field(
        default=None,
        description="Checkpoints at multiples of this many steps are kept for ever, for"
        " evaluation later. A multiple of checkpoint.every; left out, none.",
    )

    asynchronous: bool = Field(
        default=True,
        description="Write beside training, which waits only for the copy to host memory. Off,"
        " training waits until the checkpoint is on disk.",
    )
    max_failures: Count = Field(
        default=3,
        description="Saves in a row that may fail (a full or failing disk; each is tried five times"
        " and told) before the run stops.",
    )


class TrackingSection(Section):
    """MLflow. It can neither stall nor stop training: what cannot be sent waits on disk."""

    enabled: bool = Field(default=True, description="Log to MLflow. Lines are printed anyway.")
    uri: NonEmpty | None = Field(
        default=None,
        description="Tracking server or store. Left out: MLFLOW_TRACKING_URI where it is set,"
        " else a sqlite file in the run folder.",
    )
    experiment: NonEmpty = Field(
        default="longhaul", description="MLflow experiment that the run is filed under."
    )
    queue: Count = Field(
        default=10000,
        description="Metric rows held in memory for the writer; beyond it rows are dropped and"
        " counted, never waited for.",
    )


class Config(Section):
    """A whole run: one YAML file."""

    name: RunName = Field(
        description="The run's name, in MLflow and as its folder. Letters, digits, . _ and -."
    )
    seed: Index = Field(
        default=0, description="Seed of initial weights, document order and random choices."
    )
    # the factory sees the fields before it; JSON schema cannot express it, so it has no default
    run_dir: Path = Field(
        default_factory=lambda data: _default_run_dir(data),
        description="Folder of checkpoints, logs and the saved configuration. Left out:"
        " runs/<name>. On a cluster, a file system that every node sees.",
    )
    model: ModelSection = Field(description="The decoder and its memory.")
    data: DataSection = Field(description="Where tokens come from and how they are cut.")
    parallel: ParallelSection = Field(
        default_factory=ParallelSection, description="How ranks share the work."
    )
    train: TrainSection = Field(description="The optimization.")
    checkpoint: CheckpointSection = Field(
        default_factory=CheckpointSection, description="What is saved and kept."
    )
    tracking: TrackingSection = Field(
        default_factory=TrackingSection, description="Where metrics go."
    )

    @property
    def corpora(self) -> tuple[CorpusShare, ...]:
        """The training corpora: several, or one."""
        train = self.data.train
        return (CorpusShare(path=train),) if isinstance(train, Path) else train

    @property
    def num_segments(self) -> int:
        """Segments (N) in a sample."""
        return self.data.sample_len // self.data.segment_len

    @property
    def bptt_segments(self) -> int:
        """Segments between detaches: the N of one call of the model in training."""
        return (self.train.bptt_len or self.data.sample_len) // self.data.segment_len


def _default_run_dir(fields: dict[str, Any]) -> Path:
    return Path("runs", fields["name"])
