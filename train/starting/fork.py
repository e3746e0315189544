"""`longhaul pretrain FILE --fork NAME`: another run that begins from this one's newest checkpoint.

What it takes along follows from what is otherwise in its configuration:

    everything             nothing that makes another run of it: it goes on at the parent's step, on
                           the same samples, as the parent itself would (a branch: another schedule)
    weights and moments    other data, seed, batch or sample length, the same model: step 0, new
                           data from its beginning, no memory of what the parent read
    weights                another model: by name, through model.init_from; optimizer begins anew

The parent's folder is only read. The new one has files of its own and says in parent.json, in its
manifests and in MLflow where it comes from; its parent may be deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data.durable import sync, write_atomically
from data.ledger import FOLDER, list_files
from train.checkpoints.folder import begin, commit
from train.checkpoints.manifest import BadCheckpoint, Manifest, file_hash, newest_manifest, verify
from train.checkpoints.names import list_checkpoints, step_name
from train.checkpoints.tensor_copy import copy_tensors
from train.huggingface.tokenizer_files import require_trained_on
from train.settings.config import Config, apply_overrides, parse_overrides, validate
from train.starting.again import more_steps
from train.starting.changes import Change, find_changes
from train.starting.fork_name import PARENT, fork_problem, name_fork

Kept = Literal["everything", "weights and moments", "weights"]
OPTIMIZER = ("master/", "exp_avg/", "exp_avg_sq/")
"""What tensors of weights and moments are called; see train.checkpoints.stored."""


class Data(NamedTuple):
    """What a fork wants to know of the corpora that it is to train on."""

    fingerprint: str
    vocab_size: int  # ids that the model needs for them
    tokenizer_sha256: str


class Fork(NamedTuple):
    """A run that begins, or began, from another one's checkpoint."""

    parent: Path  # run folder
    config: Config  # of the new run
    keeps: Kept
    begun: bool  # whether it has a checkpoint to go on from


def plan_fork(config: Config, name: str, data: Data) -> Fork:
    """Return the fork `name` of the run that config goes on with, config's values for its own.

    data: config's. Raises ConfigError where there is nothing to fork, another run has the name, or
    the data's tokenizer is not the parent's.
    """
    child, origin = name_fork(config, name)
    if origin is not None and list_checkpoints(_checkpoints(child)):
        if origin["keeps"] == "weights":
            child = _starting_from(child, Path(origin["checkpoint"]))
        return Fork(config.run_dir, child, origin["keeps"], begun=True)
    manifest = newest_manifest(_checkpoints(config))
    if manifest is None:
        raise fork_problem(
            name,
            f"{config.run_dir} has no checkpoint to begin from; leave --fork out for a new run",
        )
    changes = find_changes(config, manifest, data.vocab_size)
    keeps = what_is_kept(changes, manifest.data == data.fingerprint)
    if keeps == "everything" and manifest.step >= config.train.steps:
        raise fork_problem(
            name,
            f"it would go on at step {manifest.step} of {config.run_dir}, and"
            f" train.steps={config.train.steps} leaves nothing to train;"
            f" {more_steps(manifest.step)}",
        )
    newest = _checkpoints(config) / step_name(manifest.step)
    if keeps == "weights":
        # Every rank finds it by itself; reading the weights compares the hashes.
        child = _starting_from(child, newest)
    else:
        corpora = " + ".join(part.name for part in config.corpora)
        try:
            require_trained_on(newest, manifest, data.tokenizer_sha256, corpora)
        except ValueError as error:
            raise fork_problem(name, f"data.train: {error}") from None
    return Fork(config.run_dir, child, keeps, begun=False)


def what_is_kept(changes: list[Change], same_data: bool) -> Kept:
    """Return what a run with such changes can take over."""
    if any(change.of_model for change in changes):
        return "weights"
    if same_data and not any(change.needs_fork for change in changes):
        return "everything"
    return "weights and moments"


def begin_fork(fork: Fork, data: Data, say: Callable[[str], None]) -> None:
    """Make the new run's folder, with its first checkpoint (one process does this).

    Killed at any moment, it can be called again. Raises ValueError where no checkpoint of the
    parent is good, and OSError where a file cannot be written.
    """
    checkpoint, manifest = _newest_good(_checkpoints_of(fork.parent), say)
    origin = {
        "run": str(fork.parent),
        "checkpoint": str(checkpoint),
        "step": manifest.step,
        "keeps": fork.keeps,
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    folder = fork.config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PARENT, json.dumps(origin, indent=1))
    if fork.keeps == "everything":
        _take_everything(fork.config, checkpoint, manifest, origin)
    elif fork.keeps == "weights and moments":
        _take_optimizer(fork.config, checkpoint, manifest, origin, data)
    say(f"{folder} begins with {fork.keeps} of {checkpoint} (step {manifest.step})")


def _take_everything(
    config: Config, checkpoint: Path, manifest: Manifest, origin: dict[str, Any]
) -> None:
    """Begin at the parent's step, with its files where the file system can share them.

    None of them is ever written again.
    """
    # The parent's values otherwise: the first start then tells what is changed, and the layout
    # that its memory was saved in stays known.
    names = {"name": config.name, "run_dir": str(config.run_dir)}
    work = begin(_checkpoints(config), manifest.step)
    for name in manifest.files:
        _share(checkpoint / name, work / name)
    run = checkpoint.parent.parent
    # Of the samples until here; later ones are superseded.
    for file in [*list_files(run / FOLDER), *sorted((run / FOLDER).glob("attempt-*.skipped"))]:
        (config.run_dir / FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(file, config.run_dir / FOLDER / file.name)
    log = run / "log.jsonl"
    if log.exists():
        rows = log.read_text().splitlines(keepends=True)
        kept = [r for r in rows if r.endswith("\n") and json.loads(r)["step"] <= manifest.step]
        write_atomically(config.run_dir / "log.jsonl", "".join(kept))
    commit(work, replace(manifest, config=manifest.config | names, parent=origin))


def _take_optimizer(
    config: Config, checkpoint: Path, manifest: Manifest, origin: dict[str, Any], data: Data
) -> None:
    """Begin at step 0, with weights, moments and the count of their updates."""
    work = begin(_checkpoints(config), 0)
    files = {}
    for name in manifest.files:
        digest = copy_tensors(checkpoint / name, work / name, lambda n: n.startswith(OPTIMIZER))
        files[name] = {"sha256": digest, "bytes": (work / name).stat().st_size}
    made = replace(
        manifest,
        step=0,
        position=0,
        nonfinite=0,
        rollbacks=0,
        rolled_back=0,
        config=config.model_dump(mode="json"),
        data=data.fingerprint,
        vocab_size=config.model.vocab_size or data.vocab_size,
        files=files,
        parent=origin,
        tokenizer_sha256=data.tokenizer_sha256,
    )
    commit(work, made)


def _share(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has none to give."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)
        if file_hash(source) != file_hash(target):
            raise OSError(f"{target} was not copied as {source} is") from None


def _newest_good(folder: Path, say: Callable[[str], None]) -> tuple[Path, Manifest]:
    """Return the newest checkpoint whose files are what was written."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return checkpoint, verify(checkpoint)
        except BadCheckpoint as error:
            say(f"checkpoint not used: {error}")
    raise ValueError(f"{folder} has no good checkpoint to begin from")


def _starting_from(config: Config, checkpoint: Path) -> Config:
    change = parse_overrides([f"model.init_from={checkpoint}"])
    return validate(apply_overrides(config.model_dump(mode="json"), change))


def _checkpoints(config: Config) -> Path:
    return _checkpoints_of(config.run_dir)


def _checkpoints_of(run: Path) -> Path:
    return run / "checkpoints"
