"""What a checkpoint says of itself, and whether its files are still what was written.

Knows bytes and names only, so a command that lists terabytes starts without torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.durable import write_atomically
from data.patience import patiently
from train.checkpoints.names import list_checkpoints

FORMAT = 2
VERIFIED = "verified.json"
"""In a checkpoint's folder: when its files were last hashed and right. Not part of it."""


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
    parent: dict[str, Any] | None = None  # of a fork: run, checkpoint, step, what it took
    rollbacks: int = 0  # each within checkpoint.every steps of the one before
    rolled_back: int = 0  # step of the last one
    tokenizer_sha256: str | None = None  # of the training corpus's; None: an older longhaul's

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(int(file["bytes"]) for file in self.files.values())

    @property
    def imported(self) -> bool:
        """Whether `longhaul import` wrote it: it was trained on no corpus of ours."""
        return not self.data


class BadCheckpoint(Exception):
    """A checkpoint folder that must not be loaded; says what is wrong with it."""


def read_manifest(checkpoint: Path) -> Manifest:
    """Return a checkpoint's manifest.

    Raises BadCheckpoint where it is missing, unreadable, of another format, or not as written.
    """
    try:
        path = checkpoint / "manifest.json"
        values = dict(json.loads(patiently(path.read_text, path)))
    except (OSError, ValueError, TypeError) as error:
        raise BadCheckpoint(f"{checkpoint}: no readable manifest.json ({error})") from error
    if values.get("format") != FORMAT:
        raise BadCheckpoint(
            f"{checkpoint}: format {values.get('format')}, this longhaul reads format {FORMAT}"
        )
    if values.pop("sha256", None) != values_hash(values):
        raise BadCheckpoint(
            f"{checkpoint}/manifest.json: its content is not what was written; it was damaged"
        )
    try:
        return Manifest(**values)
    except TypeError as error:
        raise BadCheckpoint(f"{checkpoint}/manifest.json: {error}") from error


def saved_format(checkpoint: Path) -> int | None:
    """Return the number of the format that a checkpoint was saved in, None where it shows none."""
    try:
        return int(json.loads((checkpoint / "manifest.json").read_text())["format"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def newest_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of the newest checkpoint in folder that has one."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return read_manifest(checkpoint)
        except BadCheckpoint:
            continue  # resuming passes over it too, and says so
    return None


def verify(checkpoint: Path, names: Iterable[str] | None = None) -> Manifest:
    """Return the manifest after comparing size and sha256 of the files (names: only these).

    Raises BadCheckpoint naming the first file that differs.
    """
    manifest = read_manifest(checkpoint)
    faults = find_faults(checkpoint, manifest, names)
    if faults:
        raise BadCheckpoint(faults[0])
    return manifest


def find_faults(
    checkpoint: Path,
    manifest: Manifest,
    names: Iterable[str] | None = None,
    *,
    threads: int = 8,
    hashed: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Return a line for each file that is not what was written, in the order of their names.

    names: only these. hashed is told the bytes of each file that was read.
    """

    def examine(name: str) -> str | None:
        fault = size_fault(checkpoint, manifest, name)
        if fault is not None:
            return fault
        path, expected = checkpoint / name, manifest.files[name]
        try:
            digest = file_hash(path)
        except OSError as error:  # a disk that no longer reads
            return f"{path}: {error}"
        hashed(expected["bytes"])
        if digest != expected["sha256"]:
            return f"{path}: its sha256 is not the manifest's; the file was damaged"
        return None

    chosen = sorted(manifest.files) if names is None else list(names)
    with ThreadPoolExecutor(max(1, min(threads, len(chosen)))) as pool:  # hashing frees the GIL
        return [fault for fault in pool.map(examine, chosen) if fault is not None]


def size_fault(checkpoint: Path, manifest: Manifest, name: str) -> str | None:
    """Return what is wrong with a file as far as it shows without reading it."""
    if name not in manifest.files:
        return f"{checkpoint}: the manifest knows no file {name}"
    path, expected = checkpoint / name, manifest.files[name]
    if not path.exists():
        return f"{path}: missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, {expected['bytes']} were written"
    return None


def values_hash(values: dict[str, Any]) -> str:
    """Return the sha256 of a manifest's values, whatever the order and spacing in its file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the sha256 of a file's bytes."""

    def digest() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return patiently(digest, path)


def record_verified(checkpoint: Path, manifest: Manifest) -> None:
    """Write down that all files were hashed and right just now, and what they look like.

    Where the folder cannot be written, nothing is: the next one who asks hashes again.
    """
    with contextlib.suppress(OSError):
        record = {"at": time.time(), "files": _appearance(checkpoint, manifest)}
        write_atomically(checkpoint / VERIFIED, json.dumps(record), rivals=True)


def verified_at(checkpoint: Path, manifest: Manifest) -> float | None:
    """Return when the files, untouched since, were found right (seconds since 1970), else None."""
    try:
        record = json.loads((checkpoint / VERIFIED).read_text())
        if record["files"] == _appearance(checkpoint, manifest):
            return float(record["at"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


def _appearance(checkpoint: Path, manifest: Manifest) -> dict[str, list[int]]:
    """Return size and time of change of every file, the manifest too."""
    names = ["manifest.json", *manifest.files]
    stats = {name: (checkpoint / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
