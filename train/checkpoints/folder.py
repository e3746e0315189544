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
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from data.durable import write_atomically
from train.agree import of_all, of_first, together
from train.checkpoints.manifest import (
    BadCheckpoint,
    Manifest,
    newest_manifest,
    read_manifest,
    record_verified,
    values_hash,
    verify,
)
from train.checkpoints.names import list_checkpoints, point_to, step_name, step_of
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
    "verify_together",
]


def share_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def begin(folder: Path, step: int) -> Path:
    """Return a new temporary folder for a step's checkpoint, empty."""
    work = folder / f"{step_name(step)}.tmp"
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
        write_atomically(work / "manifest.json", json.dumps(values, indent=1, sort_keys=True))
        if final.exists():  # the same step again, after going back to an older checkpoint
            final.rename(work.with_suffix(".old"))
        work.rename(final)
        shutil.rmtree(work.with_suffix(".old"), ignore_errors=True)
    point_to(final)  # which brings the checkpoint's own name to disk, too
    return final


def find_newest_good(folder: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that all ranks find good; say what was passed over.

    Each rank verifies its share of the files. None where there is no checkpoint at all. Raises
    ValueError where there are some and none is good: to begin again unasked would be worse.
    """
    # Ranks may not see a shared folder alike at one moment.
    listed = of_first(lambda: list_checkpoints(folder))
    for checkpoint in reversed(listed):
        began = time.perf_counter()
        try:
            manifest = verify_together(checkpoint)
        except BadCheckpoint as error:
            say(f"checkpoint not used: {error}")
            continue
        if dist.get_rank() == 0:
            record_verified(checkpoint, manifest)
        size, seconds = manifest.nbytes, time.perf_counter() - began
        say(f"verified {checkpoint}: {size / 1e6:,.1f} MB, {size / seconds / 1e6:,.0f} MB/s")
        if checkpoint != listed[-1]:
            step, newest = step_of(checkpoint), step_of(listed[-1])
            say(f"resuming from step {step}: {newest - step} steps are lost")
        return checkpoint, manifest
    if listed:
        raise ValueError(
            f"none of the {len(listed)} checkpoints in {folder} is good, see above; mend one, or"
            " begin again with --fresh, which keeps this run's folder under another name"
        )
    return None


def verify_together(checkpoint: Path) -> Manifest:
    """Return the manifest after each rank has compared its share of the files.

    Raises BadCheckpoint, on all ranks, with what is wrong with the files of any.
    """

    def compare() -> Manifest | str:
        try:
            names = sorted(read_manifest(checkpoint).files)
            return verify(checkpoint, names[dist.get_rank() :: dist.get_world_size()])
        except (BadCheckpoint, OSError) as error:
            return str(error)

    compared = together(compare)
    mine = compared if isinstance(compared, str) else None
    found = dict.fromkeys(text for text in of_all(mine) if text is not None)
    if found:
        raise BadCheckpoint("; ".join(found))
    assert isinstance(compared, Manifest)
    return compared


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints of later steps, found damaged, to step-*.bad; return the new paths.

    Left in place, they would count among the newest, and `retain` delete good ones for them.
    """
    moved = []
    for checkpoint in list_checkpoints(folder):
        if step_of(checkpoint) > step:
            aside = checkpoint.with_suffix(".bad")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(checkpoint.rename(aside))
    if moved:
        point_to(list_checkpoints(folder)[-1])
    return moved


def choose_checkpoint(folder: Path) -> tuple[Path, Manifest]:
    """Return one checkpoint, verified: folder itself, or the newest good one of a run folder.

    Says which newer ones are not good (rank 0, on stderr). Raises ValueError where there is none.
    """
    if (folder / "manifest.json").exists() and "step-" in folder.name:
        try:
            return folder, verify(folder)
        except BadCheckpoint as error:
            raise ValueError(f"{error}; choose another checkpoint") from error
    problems = []
    for checkpoint in reversed(list_checkpoints(folder / "checkpoints")):
        try:
            manifest = verify(checkpoint)
        except BadCheckpoint as error:
            problems.append(str(error))
            continue
        if problems and os.environ.get("RANK", "0") == "0":
            text = f"WARNING: {'; '.join(problems)}; {checkpoint} is taken, which is older"
            print(text, file=sys.stderr, flush=True)
        return checkpoint, manifest
    found = "; ".join(problems) or "it has no checkpoints/step-*"
    raise ValueError(f"{folder} holds no good checkpoint: {found}")


def remove_unfinished(folder: Path) -> list[str]:
    """Delete what an interrupted save left behind; return the names."""
    leftovers = [path for path in folder.glob("step-*") if path.suffix in (".tmp", ".old")]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in leftovers]
