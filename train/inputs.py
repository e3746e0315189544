"""What a run starts from, checked before any rank waits for another.

Every process does this by itself, on the same files, so all find the same problems: the command
line prints them once and all exit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data.index import Corpus
from data.remote import Remote
from train.checkpoint import BadCheckpoint, Manifest, list_checkpoints, read_manifest
from train.config import Config, ConfigError
from train.corpora import Training, choose_course, epoch_problems, needs_counts, open_training
from train.huggingface.tokenizer_files import require_same_tokenizer
from train.init_from import Start, find_start
from train.memories import LandmarkMemory
from train.reading import model_vocab_size
from train.remote import open_remote

FIXED = (
    "model",
    "data.segment_len",
    "data.sample_len",
    "data.packing",
    "data.shuffle_shards",
    "train.batch_size",
    "seed",
)
"""What cannot change in the middle of a run: shapes of the weights, and which sample is which."""

ADDED = {"data.packing": False}
"""Fields that older checkpoints have not, and what their runs did."""

MEMORY = "model.memory.name"

FREE = ("random_state_passing", "gate_lr", "search_from")
"""Of a memory, and so inside FIXED, but a matter of training only."""


HISTORY = ("model.init_from",)
"""What was read when the run began, and never again."""


class Inputs(NamedTuple):
    """The opened data, and the checkpoint that a new run starts from."""

    train: Training
    valid: Corpus | None
    remote: Remote | None = None  # what URLs are read with
    start: Start | None = None

    def metrics(self) -> dict[str, float]:
        """Return what this rank fetched from URLs since it began, retries among it."""
        if self.remote is None:
            return {}
        return {f"fetch/{name}": value for name, value in self.remote.cache.traffic().items()}


def open_inputs(config: Config, world_size: int, *, fresh: bool = False) -> Inputs:
    """Return the run's corpora; raise ConfigError with every problem of data and checkpoint.

    fresh: the run folder's checkpoints do not matter.
    """
    problems: list[tuple[str, str]] = []
    if chooses_by_later_tokens(config):
        problems.append(
            (
                "model.memory.granularity",
                "tokens lets a token's choice of blocks depend on later ones, so the loss would see"
                " its own future; train with token_and_head or heads, and read prompts with"
                " `longhaul generate --set granularity=tokens`",
            )
        )
    remote = _open_remote(config, problems)
    train = open_training(config, problems, remote)
    valid = None
    if config.data.valid is not None:
        valid = _open(config, config.data.valid, "data.valid", problems, remote)
    if train is not None:
        problems += _tokenizer_problems(config, train, valid)
        if not needs_counts(config):
            problems += epoch_problems(config, choose_course(config, train))
    start: Start | None = None
    newest = None if fresh else newest_manifest(config.run_dir / "checkpoints")
    if newest is not None:
        problems += checkpoint_problems(config, newest)
        if train is not None and newest.data != train.fingerprint:
            problems.append(
                (
                    "data.train",
                    f"{_named(config)} is not what run {config.run_dir} was trained on (another"
                    " fingerprint: other documents, or other weights), so its position means other"
                    " documents; give those corpora, or another name or run_dir",
                )
            )
    elif train is not None:
        needed = model_vocab_size(config, train.vocab_size)
        start = find_start(config, needed, problems, fresh=fresh)
        if start is not None:
            _require_same_words(config, start, train, problems)
    if problems:
        raise ConfigError(config.name, [f"{field}: {text}" for field, text in problems])
    assert train is not None
    return Inputs(train, valid, remote, start)


def chooses_by_later_tokens(config: Config) -> bool:
    """Return whether the memory's reads are not causal: for prompts, not for losses."""
    memory = config.model.memory
    return isinstance(memory, LandmarkMemory) and bool(
        memory.retrieve and memory.granularity == "tokens"
    )


def _named(config: Config) -> str:
    return " + ".join(part.name for part in config.corpora)


def _open_remote(config: Config, problems: list[tuple[str, str]]) -> Remote | None:
    try:
        return open_remote(config)
    except ValueError as error:
        problems.append(("data.cache_dir", str(error)))
        return None


def _open(
    config: Config,
    folder: Path,
    field: str,
    problems: list[tuple[str, str]],
    remote: Remote | None,
) -> Corpus | None:
    try:
        return Corpus.open(folder, config.data.on_damage, remote)
    except (ValueError, OSError) as error:
        problems.append((field, str(error)))
        return None


def _tokenizer_problems(
    config: Config, train: Training, valid: Corpus | None
) -> list[tuple[str, str]]:
    problems = []
    held, asked = train.vocab_size, config.model.vocab_size
    needed = model_vocab_size(config, held)
    if asked is not None and asked < needed:
        landmark = f" (and a landmark, {needed})" if needed > held else ""
        problems.append(
            (
                "model.vocab_size",
                f"{asked} is less than the {held} tokens of {_named(config)}'s tokenizer"
                f"{landmark}; use {needed} or leave it out",
            )
        )
    if valid is not None and valid.tokenizer_sha256 != train.tokenizer_sha256:
        problems.append(
            (
                "data.valid",
                f"{valid.folder} was made with another tokenizer than {_named(config)};"
                " prepare both with the same one",
            )
        )
    return problems


def _require_same_words(
    config: Config, start: Start, train: Training, problems: list[tuple[str, str]]
) -> None:
    try:
        require_same_tokenizer(start.path, train.tokenizer_sha256, _named(config))
    except ValueError as error:
        problems.append(("data.train", str(error)))


def newest_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of the newest checkpoint that has one."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return read_manifest(checkpoint)
        except BadCheckpoint:
            continue  # resuming passes over it too, and says so
    return None


def checkpoint_problems(config: Config, manifest: Manifest) -> list[tuple[str, str]]:
    """Return (field, message) for what keeps this configuration from going on from a checkpoint."""
    saved, now = ADDED | _flat(manifest.config), _flat(config.model_dump(mode="json"))
    if saved[MEMORY] != now[MEMORY]:  # then the keys of each are missing in the other: one problem
        saved, now = (
            {k: v for k, v in flat.items() if k == MEMORY or not k.startswith("model.memory.")}
            for flat in (saved, now)
        )
    problems = []
    for name in sorted(saved.keys() | now.keys()):
        before, after = saved.get(name), now.get(name)
        free = name.startswith("model.memory.") and name.endswith(FREE)
        if before == after or free or name in HISTORY:
            continue
        if any(name == field or name.startswith(field + ".") for field in FIXED):
            problems.append(
                (
                    name,
                    f"{after}, but run {config.run_dir} was trained with {before}; set it back, or"
                    " give another name, or --fresh to begin again",
                )
            )
    return problems


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if f"{prefix}{name}" == "model.memory" and isinstance(value, list):
            # as overrides name them: model.memory.infini.rule
            flat[MEMORY] = " + ".join(part["name"] for part in value)
            for part in value:
                flat |= _flat(part, f"{prefix}{name}.{part['name']}.")
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
