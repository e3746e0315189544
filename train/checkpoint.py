"""Sharded checkpoints: complete or invisible, verified on load, no pickle.

    checkpoints/step-00000200/rank-00003.safetensors   a rank's own share
                              manifest.json            layout, config, sha256 of every file
    checkpoints/latest                                 the name of the newest

A save (train.saver) fills a temporary folder; the manifest is written last, then the folder gets
its name. One found damaged is set aside as step-00000200.bad when a run goes on from an older one.
A rank's share is fragments of float32 master weights and moments, named by parameter and place,
with its streams' memory and its random state (train.stored reads them at any layout). Weights
themselves are the rounded masters: not stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

FORMAT = 2

HASHING_THREADS = 4


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int  # updates done
    position: int  # samples consumed
    updates: float  # updates that were not skipped: AdamW's own count
    nonfinite: int  # steps in a row that were skipped just before
    layout: dict[str, int]  # tp, cp, dp, zero
    config: dict[str, Any]  # the resolved configuration
    data: str  # fingerprint of the training corpus
    vocab_size: int  # of the corpus's tokenizer, or as configured
    parameters: dict[str, dict[str, Any]]  # name -> shape (of a part), dim, stride
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]  # name -> sha256, bytes
    format: int = FORMAT

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(int(file["bytes"]) for file in self.files.values())


class BadCheckpoint(Exception):
    """A checkpoint folder that must not be loaded; says what is wrong with it."""


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
        values["sha256"] = _values_hash(values)
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


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in folder, oldest first."""
    return sorted(path for path in folder.glob("step-????????") if path.is_dir())


def read_manifest(checkpoint: Path) -> Manifest:
    """Return a checkpoint's manifest.

    Raises BadCheckpoint where it is missing, unreadable, of another format, or not as written.
    """
    try:
        values = dict(json.loads((checkpoint / "manifest.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BadCheckpoint(f"{checkpoint}: no readable manifest.json ({error})") from error
    if values.get("format") != FORMAT:
        raise BadCheckpoint(
            f"{checkpoint}: format {values.get('format')}, this longhaul reads format {FORMAT}"
        )
    if values.pop("sha256", None) != _values_hash(values):
        raise BadCheckpoint(
            f"{checkpoint}/manifest.json: its content is not what was written; it was damaged"
        )
    return Manifest(**values)


def verify(checkpoint: Path, names: Iterable[str] | None = None) -> Manifest:
    """Return the manifest after comparing size and sha256 of the files (names: only these).

    Raises BadCheckpoint naming the first file that differs.
    """
    manifest = read_manifest(checkpoint)
    chosen = list(manifest.files if names is None else names)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing releases the interpreter's lock
        faults = pool.map(lambda name: file_fault(checkpoint, manifest, name), chosen)
        fault = next((fault for fault in faults if fault is not None), None)
    if fault is not None:
        raise BadCheckpoint(fault)
    return manifest


def file_fault(checkpoint: Path, manifest: Manifest, name: str) -> str | None:
    """Return what is wrong with a checkpoint's file, None where it is as it was written."""
    path = checkpoint / name
    if name not in manifest.files:
        return f"{checkpoint}: the manifest knows no file {name}"
    expected = manifest.files[name]
    if not path.exists():
        return f"{path}: missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, {expected['bytes']} were written"
    if file_hash(path) != expected["sha256"]:
        return f"{path}: its sha256 is not the manifest's; the file was damaged"
    return None


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


def retain(folder: Path, *, keep: int, keep_every: int | None) -> list[Path]:
    """Delete checkpoints beyond the newest `keep`, but for multiples of keep_every; return them."""
    spent = []
    for checkpoint in list_checkpoints(folder)[:-keep]:
        step = int(checkpoint.name.removeprefix("step-"))
        if keep_every is None or step % keep_every:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = checkpoint.with_suffix(".tmp")
            checkpoint.rename(doomed)
            # What cannot be deleted now (somebody reads it) goes with remove_unfinished later.
            shutil.rmtree(doomed, ignore_errors=True)
            spent.append(checkpoint)
    return spent


def remove_unfinished(folder: Path) -> list[str]:
    """Delete what an interrupted save left behind; return the names."""
    leftovers = [path for path in folder.glob("step-*") if path.suffix in (".tmp", ".old")]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in leftovers]


def _values_hash(values: dict[str, Any]) -> str:
    """Return the sha256 of a manifest's values, whatever the order and spacing in its file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
