"""What a checkpoints folder holds, for people: what is good, what stays, what a resume takes.

Nothing here reads more than manifests and sizes; `longhaul checkpoint verify` hashes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.checkpoints.manifest import (
    BadCheckpoint,
    Manifest,
    read_manifest,
    size_fault,
    verified_at,
)
from train.checkpoints.names import list_checkpoints, step_of
from train.checkpoints.retention import LEAST_GOOD, kept_for_ever

LEFTOVERS = {
    ".tmp": "unfinished: an interrupted save or deletion",
    ".old": "unfinished: a replaced step",
    ".bad": "set aside: found damaged",
}


class Entry(NamedTuple):
    """One folder in a checkpoints folder."""

    path: Path
    manifest: Manifest | None  # None: not readable, or not a checkpoint any more
    state: str  # good, unverified, bad, or what a leftover is
    problem: str | None  # of a bad one
    verified: float | None  # when its files were hashed and right, seconds since 1970
    saved: float  # seconds since 1970
    num_bytes: int

    @property
    def usable(self) -> bool:
        """Whether a resume would consider it."""
        return self.state in ("good", "unverified")

    @property
    def tokens(self) -> int | None:
        """Tokens that were consumed."""
        return None if self.manifest is None else count_tokens(self.manifest)


def checkpoints_folder(run: Path) -> Path:
    """Return the folder of a run's checkpoints; run may be that folder itself.

    Raises ValueError where there is none.
    """
    for folder in (run / "checkpoints", run):
        if folder.is_dir() and any(folder.glob("step-*")):
            return folder
    raise ValueError(
        f"{run} holds no checkpoints (neither checkpoints/step-* nor step-*); name a run's folder,"
        " such as runs/quickstart"
    )


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is one checkpoint's, or one's leftover, and not a run's."""
    return path.name.startswith("step-") and path.is_dir()


def survey(folder: Path) -> list[Entry]:
    """Return the checkpoints in folder, oldest first, then what saves and faults left there."""
    complete = list_checkpoints(folder)
    rest = sorted(set(path for path in folder.glob("step-*") if path.is_dir()) - set(complete))
    return [inspect(path) for path in complete] + [_leftover(path) for path in rest]


def inspect(checkpoint: Path) -> Entry:
    """Return what a checkpoint is as far as it shows without hashing its files."""
    try:
        manifest = read_manifest(checkpoint)
    except BadCheckpoint as error:
        return _entry(checkpoint, None, "bad", str(error))
    for name in sorted(manifest.files):
        fault = size_fault(checkpoint, manifest, name)
        if fault is not None:
            return _entry(checkpoint, manifest, "bad", fault)
    at = verified_at(checkpoint, manifest)
    return _entry(checkpoint, manifest, "unverified" if at is None else "good", verified=at)


def _leftover(path: Path) -> Entry:
    return _entry(path, None, LEFTOVERS.get(path.suffix, "not a checkpoint"))


def _entry(
    path: Path,
    manifest: Manifest | None,
    state: str,
    problem: str | None = None,
    verified: float | None = None,
) -> Entry:
    dated = path / "manifest.json"
    saved = (dated if dated.exists() else path).stat().st_mtime
    num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Entry(path, manifest, state, problem, verified, saved, num_bytes)


def resumed_from(entries: Iterable[Entry]) -> Entry | None:
    """Return the checkpoint that a resume would take, if the files are what they seem."""
    return max((entry for entry in entries if entry.usable), key=_step, default=None)


def reasons(entries: Sequence[Entry]) -> dict[Path, str]:
    """Return why each checkpoint is kept: the policy is that of the newest readable one."""
    manifests = [entry.manifest for entry in entries if entry.manifest is not None]
    policy: dict[str, Any] = manifests[-1].config.get("checkpoint", {}) if manifests else {}
    keep = max(policy.get("keep") or LEAST_GOOD, LEAST_GOOD)
    newest = [entry.path for entry in entries if entry.usable][-keep:]
    found = {}
    for entry in entries:
        texts = [f"newest {keep}"] if entry.path in newest else []
        if entry.path.suffix == "" and kept_for_ever(_step(entry), policy.get("keep_every")):
            texts.append(f"every {policy['keep_every']}")
        found[entry.path] = ", ".join(texts)
    return found


def count_tokens(manifest: Manifest) -> int:
    """Return the tokens that were consumed until a checkpoint."""
    return manifest.position * int(manifest.config["data"]["sample_len"])


def count_parameters(manifest: Manifest) -> int:
    """Return the number of weights of the whole model."""
    total = 0
    for entry in manifest.parameters.values():
        count = 1
        for size in entry["shape"]:
            count *= size
        total += count * (1 if entry["dim"] is None else manifest.layout["tp"])
    return total


def describe_layout(layout: dict[str, int]) -> str:
    """Return a layout as the progress line has it."""
    return f"TP {layout['tp']} x CP {layout['cp']} x DP {layout['dp']}, ZeRO {layout['zero']}"


def describe_bytes(count: float) -> str:
    """Return a size in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def describe_age(seconds: float) -> str:
    """Return an age in the largest unit that has at least two of it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def describe_state(entry: Entry, now: float) -> str:
    """Return a state as the table has it."""
    if entry.verified is not None:
        return f"good, hashed {describe_age(now - entry.verified)} ago"
    return entry.state


def table(entries: Sequence[Entry], now: float | None = None) -> list[str]:
    """Return the lines of a table of the entries, and under it what is wrong and what is next."""
    now = time.time() if now is None else now
    kept, chosen = reasons(entries), resumed_from(entries)
    rows = [("step", "age", "size", "layout", "tokens", "state", "kept because")]
    for entry in entries:
        layout = "" if entry.manifest is None else describe_layout(entry.manifest.layout)
        tokens = "" if entry.tokens is None else f"{entry.tokens:,}"
        rows.append(
            (
                entry.path.name.removeprefix("step-").lstrip("0") or "0",
                describe_age(now - entry.saved),
                describe_bytes(entry.num_bytes),
                layout,
                tokens,
                describe_state(entry, now),
                kept[entry.path],
            )
        )
    lines = aligned(rows, right=(0, 1, 2, 4))
    if chosen is not None:
        at = next(i for i, entry in enumerate(entries) if entry is chosen)
        lines[at + 1] += "  <- a resume goes on here"
    problems = [f"bad: {entry.problem}" for entry in entries if entry.problem is not None]
    return lines + problems + _next(entries, chosen)


def _next(entries: Sequence[Entry], chosen: Entry | None) -> list[str]:
    """Return what a resume would lose, if anything."""
    newest = max((_step(entry) for entry in entries if entry.path.suffix == ""), default=None)
    if newest is None:
        return ["no checkpoint is complete: a resume begins at step 0"]
    if chosen is None:
        return ["no checkpoint is good: a resume refuses; mend one, or begin again with --fresh"]
    lost = newest - _step(chosen)
    return [f"a resume loses the {lost} steps since step {_step(chosen)}"] if lost else []


def aligned(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Return rows as lines with columns of one width each; columns in `right` end together."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    flush = set(right)
    return [
        "  ".join(
            cell.rjust(width) if column in flush else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _step(entry: Entry) -> int:
    return step_of(entry.path) if entry.path.suffix == "" else -1
