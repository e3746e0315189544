"""A run's training corpora: opened, mixed, and put in the order in which they are read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from data.counts import counts_file, read_counts, write_counts
from data.index import Corpus
from data.mixture import Component, Mixture, Share, plan
from data.packing import PackedStreams
from data.passes import Int64Array
from data.remote import Remote
from data.streams import Streams
from data.wide import WideCorpus
from train.agree import of_first
from train.reading.landmarks import choose_reading
from train.settings.config import Config, ConfigError

Training: TypeAlias = Corpus | WideCorpus | Mixture

_MUCH_PADDING = 0.05
"""Of an epoch; what a few percent cost is nothing beside a weight that somebody wants."""


class Course(NamedTuple):
    """What a run reads, sample by sample, and how much of each corpus that is."""

    streams: Streams
    shares: list[Share]

    def metrics(self, steps: int) -> dict[str, float]:
        """Return how often each corpus of a mixture was read, and its tokens, after so many steps.

        A pure function of the step: exact at the end of each epoch of the mixture; within one, as
        if every lane had read all corpora alike.
        """
        if len(self.shares) == 1:
            return {}
        done = steps / self.streams.steps_per_epoch
        found = {}
        names = metric_names([share.name for share in self.shares])
        for name, share in zip(names, self.shares, strict=True):
            found[f"data/epochs/{name}"] = done * share.of_corpus
            found[f"data/tokens/{name}"] = done * share.of_corpus * share.tokens
        return found

    def describe(self, steps: int) -> list[str]:
        """Return a line for each corpus, its share and how often it is read, and of padding."""
        streams, per_epoch = self.streams, self.streams.steps_per_epoch
        tokens = [share.of_corpus * share.tokens for share in self.shares]
        lines, alone = [], len(self.shares) == 1
        for share, part in zip(self.shares, tokens, strict=True):
            times = f"{steps:,} steps read it {steps / per_epoch * share.of_corpus:.3g} times"
            if alone:
                text = f"{share.tokens:,} tokens; an epoch is {per_epoch:,} steps"
            else:
                text = (
                    f"{part / sum(tokens):.2%} of the tokens; an epoch of {per_epoch:,} steps reads"
                    f" {share.of_corpus:.3g} of it"
                )
            lines.append(f"{share.name}: {text}, {times}")
        empty = 1 - streams.total_segments / (per_epoch * streams.lanes * streams.segments)
        padding = 1 - sum(tokens) / (streams.total_segments * streams.segment_len)
        if empty > _MUCH_PADDING:
            smallest = max(self.shares, key=lambda share: share.of_corpus)
            remedy = "use a smaller train.batch_size or data.sample_len"
            if not alone:
                remedy = f"it ends with {smallest.name}: lower that one's weight"
            lines.append(
                f"WARNING: an epoch is only {per_epoch:,} steps, and {empty:.0%} of it is padding;"
                f" {remedy}"
            )
        if padding > _MUCH_PADDING:
            remedy = "" if streams.packs else " or data.packing=true, where the memory takes it"
            lines.append(
                f"WARNING: {padding:.0%} of the positions are padding, which tokens/s and MFU"
                f" count: documents end inside segments of {streams.segment_len:,} tokens; use a"
                f" shorter data.segment_len{remedy}"
            )
        return lines


def open_training(
    config: Config, problems: list[tuple[str, str]], remote: Remote | None = None
) -> Training | None:
    """Return the corpora of data.train, none of which waits for another; None with a problem."""
    opener = Corpus if config.data.shuffle_shards is None else WideCorpus
    several = not isinstance(config.data.train, Path)
    found: list[Component] = []
    before = len(problems)
    for number, part in enumerate(config.corpora):
        try:
            corpus = opener.open(part.path, config.data.on_damage, remote)
        except (ValueError, OSError) as error:
            problems.append((f"data.train[{number}].path" if several else "data.train", str(error)))
        else:
            found.append(Component(part.name, corpus, part.weight))
    if len(problems) > before:
        return None
    if not several:
        return found[0].corpus
    try:
        return Mixture(found)
    except ValueError as error:
        problems.append(("data.train", str(error)))
        return None


def needs_counts(config: Config) -> bool:
    """Return whether the order is known only after a pass over the corpora's indices."""
    return config.data.shuffle_shards is not None


def choose_course(
    config: Config, training: Training, counts: Sequence[Int64Array] | None = None
) -> Course:
    """Return the course of a run. counts: see data.mixture.plan."""
    order, shares = plan(
        training,
        counts,
        seed=config.seed,
        segment_len=choose_reading(config, 0).segment_len,
        shuffle_shards=config.data.shuffle_shards,
        packing=config.data.packing,
    )
    kind = PackedStreams if config.data.packing else Streams
    lanes, segments = config.train.batch_size, config.num_segments
    return Course(kind.over(order, lanes=lanes, segments=segments), shares)


def epoch_problems(config: Config, course: Course) -> list[tuple[str, str]]:
    """Return (field, message) for each corpus that would be read more than its max_epochs."""
    shares = {share.name: share for share in course.shares}
    steps, per_epoch = config.train.steps, course.streams.steps_per_epoch
    problems = []
    for number, part in enumerate(config.corpora):
        share, limit = shares[part.name], part.max_epochs
        reads = share.most_reads(-(-steps // per_epoch))
        if limit is None or reads <= limit:
            continue
        fewer = share.most_epochs(limit) * per_epoch
        problems.append(
            (
                f"data.train[{number}].max_epochs",
                f"{limit}, but documents of {part.name} would be read up to {reads} times in"
                f" train.steps = {steps:,} ({steps / per_epoch:.3g} epochs of the mixture of"
                f" {per_epoch:,} steps, each with {share.of_corpus:.3g} of this corpus); lower its"
                f" weight, use at most {fewer:,} steps, or raise max_epochs to {reads}",
            )
        )
    return problems


def start_course(config: Config, training: Training) -> Course:
    """Return the course of a run, the same on all ranks, which call this together.

    Where it takes a pass over indices, rank 0 does that, once for a run folder, and all are told.
    Raises ConfigError, on all ranks, for damage that it finds, and for max_epochs.
    """
    if not needs_counts(config):
        return choose_course(config, training)
    components = training.components if isinstance(training, Mixture) else None
    corpora = [part.corpus for part in components] if components else [training]

    def count() -> list[Int64Array] | str:
        try:
            return [_count(config, corpus) for corpus in corpora]
        except (ValueError, OSError) as error:
            return str(error)

    counts = of_first(count)
    if isinstance(counts, str):
        raise ConfigError(config.name, [f"data.train: {counts}"])
    course = choose_course(config, training, counts)
    if problems := epoch_problems(config, course):
        raise ConfigError(config.name, [f"{field}: {text}" for field, text in problems])
    return course


def _count(config: Config, corpus: object) -> Int64Array:
    """Return the segments of each shard of a corpus, after a look at all its files."""
    assert isinstance(corpus, WideCorpus)
    corpus.check()
    segment_len = choose_reading(config, 0).segment_len
    path = counts_file(config.run_dir / "data", corpus, segment_len)
    counts = read_counts(path, corpus, segment_len)
    if counts is None:
        shards = len(corpus.manifest.shards)
        print(
            f"{corpus.folder}: counting the segments of {shards:,} shards, once for this run",
            file=sys.stderr,
            flush=True,
        )
        counts = corpus.scan(segment_len)
        write_counts(path, corpus, segment_len, counts)
    return counts


def metric_names(names: Sequence[str]) -> list[str]:
    """Return short, different names of corpora: the ends of their paths, as long as it takes."""
    parts = [Path(name).parts for name in names]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["_".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends) and not set(ends) & {"train", "valid"}:
            return ends
    return [name.strip("/").replace("/", "_") for name in names]


def keys_per_token(streams: Streams, window: int) -> float | None:
    """Return the mean of keys read by attention where segments are packed; None: whole segments."""
    return streams.keys_per_token(window) if isinstance(streams, PackedStreams) else None
