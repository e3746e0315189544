"""Which checkpoints stay: the newest good ones, and every n-th for ever.

One that is damaged counts for nothing: whatever happens to the newest, two good ones remain.
Before an older one goes, those that stay in its place have been hashed from disk, each once.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from train.checkpoints.manifest import (
    BadCheckpoint,
    read_manifest,
    record_verified,
    verified_at,
    verify,
)
from train.checkpoints.names import LATEST, list_checkpoints, point_to, step_of

LEAST_GOOD = 2
LIVE_S = 600
"""Seconds after which nobody writes to an unfinished save any more."""


def retain(
    folder: Path,
    *,
    keep: int,
    keep_every: int | None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Delete checkpoints older than the newest `keep` good ones, and return them.

    Multiples of keep_every stay. What is damaged is named, left where it is, and not counted.
    """
    checkpoints = list_checkpoints(folder)
    wanted = max(keep, LEAST_GOOD)
    if len(checkpoints) <= wanted:
        return []
    good = 0
    while checkpoints and good < wanted:
        good += is_good(checkpoints.pop(), say)
    deleted = []
    for checkpoint in checkpoints:
        if not kept_for_ever(step_of(checkpoint), keep_every):
            try:
                delete(checkpoint)
            except OSError as error:  # a save has succeeded all the same
                say(f"{checkpoint} could not be deleted: {error}")
                continue
            deleted.append(checkpoint)
    return deleted


def kept_for_ever(step: int, keep_every: int | None) -> bool:
    """Return whether a step's checkpoint is one that no newer one replaces."""
    return keep_every is not None and step % keep_every == 0


def is_good(checkpoint: Path, say: Callable[[str], None] = lambda text: None) -> bool:
    """Return whether all files are what was written; files untouched since are hashed only once."""
    try:
        manifest = read_manifest(checkpoint)
        if verified_at(checkpoint, manifest) is None:
            verify(checkpoint)
            record_verified(checkpoint, manifest)
    except (BadCheckpoint, OSError) as error:
        say(f"damaged, and not counted among those to keep: {error}")
        return False
    return True


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint's folder.

    Renamed first: a half-deleted folder must not look like a checkpoint. What cannot be deleted
    now, because somebody reads it, is a leftover that the next start of the run removes.
    """
    doomed = checkpoint.with_name(f"{checkpoint.name}.deleted.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def check_removal(paths: Sequence[Path]) -> None:
    """Return if every run that loses these checkpoints keeps two good ones.

    Raises ValueError where it does not, and where a save may still be writing one of them.
    """
    for path in paths:
        age = time.time() - max(file.stat().st_mtime for file in (path, *path.rglob("*")))
        if path.suffix == ".tmp" and age < LIVE_S:
            raise ValueError(
                f"{path} was written {age:.0f} s ago, so a save may be at work on it; wait until it"
                f" is {LIVE_S} s old, or give --force where no run is alive"
            )
    doomed = {path.resolve() for path in paths}
    for folder in sorted({path.parent for path in doomed}):
        checkpoints = list_checkpoints(folder)
        if not doomed.intersection(checkpoints):
            continue  # leftovers only
        problems: list[str] = []
        rest = [path for path in reversed(checkpoints) if path not in doomed]
        good: list[Path] = []
        while rest and len(good) < LEAST_GOOD:
            checkpoint = rest.pop(0)
            good += [checkpoint] if is_good(checkpoint, problems.append) else []
        if len(good) < LEAST_GOOD:
            found = "".join(f"; {problem}" for problem in problems)
            raise ValueError(
                f"{folder} would keep {len(good)} good checkpoints, and {LEAST_GOOD} must remain"
                f" (one may turn out damaged){found}; name fewer, or give --force"
            )


def remove(paths: Iterable[Path]) -> None:
    """Delete checkpoints and let `latest` name the newest that remains."""
    for path in paths:
        folder, name = path.resolve().parent, path.resolve().name
        delete(path.resolve())
        pointer = folder / LATEST
        if pointer.exists() and pointer.read_text() == name:
            if rest := list_checkpoints(folder):
                point_to(rest[-1])
            else:
                pointer.unlink(missing_ok=True)
