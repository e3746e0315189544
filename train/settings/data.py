"""The data section of a run's configuration: corpora, and how their documents are cut."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer

from data.urls import shown_folder, url_of
from train.settings.units import ByteSize, Count, Duration, Index, Positive, Section, TokenLength

# a Path folds the // of a URL: data.urls unfolds it
Folder = Annotated[
    Path,
    PlainSerializer(lambda path: url_of(path) or str(path), return_type=str, when_used="json"),
]


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


def _as_written(train: Path | tuple[CorpusShare, ...]) -> str | list[dict[str, Any]]:
    """Return data.train for a file. Left to pydantic, a Folder's serializer would take a tuple."""
    if isinstance(train, Path):
        return url_of(train) or str(train)
    return [share.model_dump(mode="json") for share in train]


class DataSection(Section):
    """Where the tokens come from and how documents are cut. Prepare folders with `prepare`."""

    train: Annotated[
        Folder | tuple[CorpusShare, ...], PlainSerializer(_as_written, when_used="json")
    ] = Field(
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
