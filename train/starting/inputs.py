"""What a run starts from, checked before any rank waits for another.

Every process does this by itself, on the same files, so all find the same problems: the command
line prints them once and all exit.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data.index import Corpus
from data.remote import Remote
from train.checkpoints.manifest import FORMAT, Manifest, newest_manifest, saved_format
from train.checkpoints.names import list_checkpoints
from train.huggingface.tokenizer_files import require_trained_on
from train.reading.corpora import (
    Training,
    choose_course,
    epoch_problems,
    needs_counts,
    open_training,
)
from train.reading.landmarks import model_vocab_size
from train.reading.remote import open_remote
from train.settings.config import Config, ConfigError
from train.settings.memories import LandmarkMemory, find_memory
from train.starting.changes import find_changes
from train.starting.init_from import Start, find_start

if TYPE_CHECKING:
    from train.evaluation.questions import Questions


class Inputs(NamedTuple):
    """The opened data, and the checkpoint that a new run starts from."""

    train: Training
    valid: Corpus | None
    remote: Remote | None = None  # what URLs are read with
    start: Start | None = None
    questions: Questions | None = None  # of train.eval_tasks

    def metrics(self) -> dict[str, float]:
        """Return what this rank fetched from URLs since it began, retries among it."""
        if self.remote is None:
            return {}
        return {f"fetch/{name}": value for name, value in self.remote.cache.traffic().items()}


def open_inputs(config: Config, *, fresh: bool = False, starts: bool = True) -> Inputs:
    """Return the run's corpora; raise ConfigError with every problem of data and checkpoint.

    fresh: the run folder's checkpoints do not matter. starts: a new run begins from
    model.init_from, where that is set (a fork does not: it begins from its parent).
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
    questions = None if valid is None else _open_questions(config, valid, problems)
    if train is not None:
        problems += _tokenizer_problems(config, train, valid)
        if not needs_counts(config):
            problems += epoch_problems(config, choose_course(config, train))
    problems += _folder_problems(config.run_dir)
    start: Start | None = None
    newest = None if fresh else newest_manifest(config.run_dir / "checkpoints")
    if not fresh:
        problems += _unreadable_problems(config.run_dir / "checkpoints")
    if newest is not None:
        held = None if train is None else model_vocab_size(config, train.vocab_size)
        problems += checkpoint_problems(config, newest, held)
        if train is not None and newest.data != train.fingerprint:
            problems.append(
                (
                    "data.train",
                    f"{_named(config)} is not what run {config.run_dir} was trained on (another"
                    " fingerprint: other documents, or other weights), so its position means other"
                    " documents; give those corpora, or start another run from its weights with"
                    " --fork NAME",
                )
            )
    elif train is not None and starts:
        needed = model_vocab_size(config, train.vocab_size)
        start = find_start(config, needed, problems, fresh=fresh)
        # where the sizes differ, the vocabularies are said to already
        if start is not None and "model.vocab_size" not in dict(problems):
            _require_same_words(config, start, train, problems)
    if problems:
        raise ConfigError(config.name, [f"{field}: {text}" for field, text in problems])
    assert train is not None
    return Inputs(train, valid, remote, start, questions)


def chooses_by_later_tokens(config: Config) -> bool:
    """Return whether the memory's reads are not causal: for prompts, not for losses."""
    memory = find_memory(config.model.memory, "landmark")
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


def _open_questions(
    config: Config, valid: Corpus, problems: list[tuple[str, str]]
) -> Questions | None:
    if not config.train.eval_tasks:
        return None
    from train.evaluation.tasks import open_questions

    try:
        return open_questions(config, valid)
    except (ValueError, OSError) as error:
        problems.append(("train.eval_tasks", str(error)))
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
        sha256 = train.tokenizer_sha256
        require_trained_on(start.path, start.manifest, sha256, _named(config))
    except ValueError as error:
        problems.append(("data.train", str(error)))


def checkpoint_problems(
    config: Config, manifest: Manifest, vocab_size: int | None = None
) -> list[tuple[str, str]]:
    """Return (field, message) for what keeps this configuration from going on from a checkpoint.

    vocab_size: what the data needs, where the configuration leaves it out.
    """
    return [
        (
            change.field,
            f"{change.after}, but run {config.run_dir} was trained with {change.before}; set it"
            " back, or start another run from its weights with --fork NAME",
        )
        for change in find_changes(config, manifest, vocab_size)
        if change.needs_fork
    ]


def _unreadable_problems(folder: Path) -> list[tuple[str, str]]:
    """Return a problem where the newest checkpoint is of a newer longhaul.

    Resuming would pass over it, as over a damaged one, and do its steps again.
    """
    newest = list_checkpoints(folder)[-1:]
    for checkpoint in newest:
        found = saved_format(checkpoint)
        if found is not None and found > FORMAT:
            text = (
                f"{checkpoint} has format {found}, this longhaul reads format {FORMAT}; update"
                f" longhaul, or delete it (longhaul checkpoint rm {checkpoint}) to go on from an"
                " older one"
            )
            return [("checkpoint", text)]
    return []


def _folder_problems(run_dir: Path) -> list[tuple[str, str]]:
    """Return a problem where nothing can be written into the run folder."""
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return []
    what = "cannot be written (read-only, or not yours)" if folder.is_dir() else "is no folder"
    return [("run_dir", f"{folder} {what}; give another run_dir, or mend its permissions")]
