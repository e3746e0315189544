"""Sharded checkpoints: complete or invisible, verified on load, no pickle.

    checkpoints/step-00000200/rank-00003.safetensors   a rank's own share
                              manifest.json            layout, config, sha256 of every file
    checkpoints/latest                                 the name of the newest

A save (train.checkpoints.saver) fills a temporary folder; the manifest is written last, then the
folder gets its name. One found damaged is set aside as step-00000200.bad when a run goes on from
an older one. A rank's share is fragments of float32 master weights and moments, named by parameter
and place, with its streams' memory and its random state (train.checkpoints.stored reads them at any
layout). Weights themselves are the rounded masters: not stored.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from train.checkpoints.manifest import (
    BadCheckpoint,
    Manifest,
    list_checkpoints,
    newest_manifest,
    read_manifest,
    record_verified,
    values_hash,
    verify,
)
from train.checkpoints.retention import retain

__all__ = [
    "BadCheckpoint",
    "Manifest",
    "begin",
    "choose_checkpoint",
    "commit",
    "find_newest_good",
    "list_checkpoints",
    "newest_manifest",
    "read_manifest",
    "remove_unfinished",
    "retain",
    "set_aside_after",
    "share_name",
    "verify",
]


def share_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def begin(folder: Path, step: int) -> Path:
    """Return a new temporary folder for a step's checkpoint, empty."""
    work = folder / f"step-{step:08d}.tmp"
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    return work


def commit(work: Path, manifest: Manifest) -> Path:
    """Make the filled temporary folder a checkpoint, and return its path.

    Its files are on disk already; until its rename nobody sees them. May be called again after an
    OSError.
    """
    final = work.with_suffix("")
    if work.exists():
        values = asdict(manifest)
        values["sha256"] = values_hash(values)
        _write(work / "manifest.json", json.dumps(values, indent=1, sort_keys=True))
        _sync(work)
        if final.exists():  # the same step again, after going back to an older checkpoint
            final.rename(work.with_suffix(".old"))
        work.rename(final)
        shutil.rmtree(work.with_suffix(".old"), ignore_errors=True)
    _point(final.parent, final)
    return final


def _point(folder: Path, checkpoint: Path) -> None:
    """Let `latest`, for people and their scripts, name a checkpoint; loading lists the folder."""
    _write(folder / "latest.tmp", checkpoint.name)
    (folder / "latest.tmp").rename(folder / "latest")
    _sync(folder)


def find_newest_good(folder: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that all ranks find good; say what was passed over.

    Each rank verifies its share of the files. None where there is no checkpoint at all. Raises
    ValueError where there are some and none is good: to begin again unasked would be worse.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    listed = [list_checkpoints(folder)]
    dist.broadcast_object_list(listed)  # ranks may not see a shared folder alike at one moment
    newest_step: int | None = None
    for checkpoint in reversed(listed[0]):
        problem: str | None = None
        manifest: Manifest | None = None
        began = time.perf_counter()
        try:
            manifest = read_manifest(checkpoint)
            verify(checkpoint, sorted(manifest.files)[rank::world])
        except (BadCheckpoint, OSError) as error:
            problem = str(error)
        problems: list[str | None] = [None] * world
        dist.all_gather_object(problems, problem)
        found = [text for text in problems if text is not None]
        step = int(checkpoint.name.removeprefix("step-"))
        newest_step = step if newest_step is None else newest_step
        if not found:
            assert manifest is not None
            if rank == 0:
                record_verified(checkpoint, manifest)
            size, seconds = manifest.nbytes, time.perf_counter() - began
            say(f"verified {checkpoint}: {size / 1e6:,.1f} MB, {size / seconds / 1e6:,.0f} MB/s")
            if step != newest_step:
                say(f"resuming from step {step}: {newest_step - step} steps are lost")
            return checkpoint, manifest
        say(f"checkpoint not used: {'; '.join(dict.fromkeys(found))}")
    if listed[0]:
        raise ValueError(
            f"none of the {len(listed[0])} checkpoints in {folder} is good, see above; mend one, or"
            " begin again with --fresh, which keeps this run's folder under another name"
        )
    return None


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints of later steps, found damaged, to step-*.bad; return the new paths.

    Left in place, they would count among the newest, and `retain` delete good ones for them.
    """
    moved = []
    for checkpoint in list_checkpoints(folder):
        if int(checkpoint.name.removeprefix("step-")) > step:
            aside = checkpoint.with_suffix(".bad")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(checkpoint.rename(aside))
    if moved:
        _point(folder, list_checkpoints(folder)[-1])
    return moved


def choose_checkpoint(folder: Path) -> tuple[Path, Manifest]:
    """Return one checkpoint, verified: folder itself, or the newest good one of a run folder.

    Raises ValueError where there is none.
    """
    if (folder / "manifest.json").exists() and "step-" in folder.name:
        try:
            return folder, verify(folder)
        except BadCheckpoint as error:
            raise ValueError(f"{error}; choose another checkpoint") from error
    problems = []
    for checkpoint in reversed(list_checkpoints(folder / "checkpoints")):
        try:
            return checkpoint, verify(checkpoint)
        except BadCheckpoint as error:
            problems.append(str(error))
    found = "; ".join(problems) or "it has no checkpoints/step-*"
    raise ValueError(f"{folder} holds no good checkpoint: {found}")


def remove_unfinished(folder: Path) -> list[str]:
    """Delete what an interrupted save left behind; return the names."""
    leftovers = [path for path in folder.glob("step-*") if path.suffix in (".tmp", ".old")]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in leftovers]


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    """Bring a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
