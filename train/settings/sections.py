"""A run's configuration: every section of it, with each field's type, default, unit and meaning.

The large sections have files of their own: `model`, `data` and `training`. What one field alone
must satisfy is said there; what fields must satisfy together is in `train.settings.rules`; reading
a file into these models is in `train.settings.config`. The model package has its own plain
dataclasses with the same names, so that it needs no pydantic.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from train.settings.data import CorpusShare, DataSection
from train.settings.model import ModelSection
from train.settings.training import TrainSection
from train.settings.units import Count, Duration, Index, Positive, Section, Whole

# it names a folder, an experiment's run and files, so nothing a shell or a URL would change
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
NonEmpty = Annotated[str, Field(min_length=1)]


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
