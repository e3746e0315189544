"""What ledgers prove: a run consumed each sample exactly once, or where not; two runs the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.history import History, Range, ranges, read_history
from data.ledger import FOLDER
from data.wording import counted
from train.checkpoints.manifest import BadCheckpoint, newest_manifest, read_manifest
from train.checkpoints.names import list_checkpoints
from train.tracking.timeline import read_events


class Finding(NamedTuple):
    """What was found: sentences for people, the same as values for programs."""

    good: bool
    sentences: list[str]
    values: dict[str, Any]


class Run(NamedTuple):
    """A run's ledger, and up to where it has to be complete."""

    path: Path
    history: History
    end: int  # samples: of the newest checkpoint, or of the ledger where there is none
    checkpoint: str | None


def verify(runs: list[Path]) -> Finding:
    """Return what the ledgers of one run say, or of two compared.

    Raises ValueError for a folder without a ledger.
    """
    opened = [open_run(path) for path in runs]
    found = [check(run) for run in opened]
    values: dict[str, Any] = {"runs": [finding.values for finding in found]}
    if len(opened) == 2:
        found.append(compare(*opened))
        values["comparison"] = found[-1].values
    good = all(finding.good for finding in found)
    sentences = [sentence for finding in found for sentence in finding.sentences]
    return Finding(good, sentences, {"good": good, **values, "sentences": sentences})


def open_run(path: Path) -> Run:
    """Return a run folder's ledger; ValueError where there is none."""
    newest = newest_manifest(path / "checkpoints")
    if newest is not None and newest.imported:
        raise ValueError(
            f"{path} holds an imported model: nothing was trained there, so no samples were"
            " consumed; name the folder of a run that was trained"
        )
    history = read_history(path / FOLDER)
    for checkpoint in reversed(list_checkpoints(path / "checkpoints")):
        try:
            return Run(path, history, read_manifest(checkpoint).position, checkpoint.name)
        except BadCheckpoint:
            continue  # resuming passes over it too
    return Run(path, history, history.extent(), None)


def check(run: Run) -> Finding:
    """Return whether positions 0 to the newest checkpoint's were consumed exactly once each."""
    history, end = run.history, run.end
    missing, twice = history.missing(end), history.twice(end)
    in_flight = int((history.counts[max(0, end - history.base) :] > 0).sum())
    count, changed = len(history.attempts), ranges_of(history.changed)
    good = not missing and not twice and not changed
    until = f"up to {run.checkpoint}" if run.checkpoint else "(it has no checkpoint)"
    said = [f"{counted(count, 'attempt')}, {counted(end, 'sample')} {until}"]
    if not missing and not twice:
        said[0] += ": each exactly once"
    if passed := history.passed_over(end):
        count_passed = sum(part.stop - part.start for part in passed)
        said.append(
            f"{count_passed:,} of them left no trace in the weights (skipped as bad, or rolled"
            f" back): {samples(passed, history.batch_size)}"
        )
    if missing:
        said.append(f"missing: {samples(missing, history.batch_size)}")
        if missing[0].start == 0 and missing[0].stop == history.base:
            said.append(
                f"its ledger begins at sample {history.base:,}: what came before is in the ledger"
                " of the run that it was begun from, or was done before runs kept one"
            )
    if twice:
        said.append(f"twice: {samples(twice, history.batch_size)}")
    if history.redone:
        same = "not the same as before: " + samples(changed, history.batch_size)
        said.append(
            f"{counted(history.redone, 'sample')} {'was' if history.redone == 1 else 'were'} done"
            f" again after a resume,"
            f" {same if changed else 'the same each time'}"
        )
    left_out = left_out_of(run.path)
    if left_out:
        said.append(
            f"{len(left_out):,} damaged documents or files were left out of them, padding in their"
            f" place (data.on_damage=skip): {'; '.join(left_out[:3])}"
        )
    if in_flight and run.checkpoint:
        said.append(f"{in_flight:,} samples after it are in no checkpoint: a resume does them anew")
    values = {
        "run": str(run.path),
        "good": good,
        "checkpoint": run.checkpoint,
        "samples": end,
        "batch_size": history.batch_size,
        "attempts": [attempt._asdict() for attempt in history.attempts],
        "missing": missing,
        "twice": twice,
        "passed_over": passed,
        "redone": history.redone,
        "changed": changed,
        "in_flight": in_flight,
        "left_out": left_out,
        "notes": history.notes,
    }
    return Finding(good, [f"{run.path}: {text}" for text in [*said, *history.notes]], values)


def left_out_of(run: Path) -> list[str]:
    """Return what a run said that it left out as damaged."""
    events = [event for event in read_events(run) if event["kind"] == "left_out"]
    return list(dict.fromkeys(text for event in events for text in event["left_out"]))


def compare(one: Run, other: Run) -> Finding:
    """Return whether two runs consumed the same samples in the same order.

    The part that both have counts. Positions are the unit, whatever the batch sizes.
    """
    mine, theirs = one.history, other.history
    common = min(one.end, other.end)
    base = min(max(mine.base, theirs.base), common)
    a, b = (slice(base - history.base, common - history.base) for history in (mine, theirs))
    both = (padded(mine.counts, a) > 0) & (padded(theirs.counts, b) > 0)
    different = (padded(mine.hashes, a) != padded(theirs.hashes, b)) & both[:, None]
    unequal = ranges(different.any(axis=1), base)
    names = f"{one.path} and {other.path}"
    good = not unequal and common > 0
    said = [_compared(names, common, unequal, int(both.sum()))]
    if unequal:
        place = unequal[0].start - base
        what = "tokens" if different[place, 0] else "labels or document starts"
        step = f"step {unequal[0].start // mine.batch_size + 1} of {one.path}"
        said.append(f"the first that differs is sample {unequal[0].start:,} ({step}): {what}")
    if one.end != other.end:
        longer = max(one, other, key=lambda run: run.end)
        said.append(f"compared is what both have; {longer.path} goes on to {longer.end:,}")
    settings = _settings(mine, theirs)
    said += [f"{name} is {x} in {one.path}, {y} in {other.path}" for name, x, y in settings]
    if unequal and any(name == "batch_size" for name, _, _ in settings):
        said.append("with another batch_size documents lie in other lanes, so the order differs")
    values = {
        "same_order": not unequal,
        "common": common,
        "compared": int(both.sum()),
        "first_difference": unequal[0].start if unequal else None,
        "different": unequal,
        "settings": {name: [x, y] for name, x, y in settings},
    }
    return Finding(good, said, values)


def _compared(names: str, common: int, unequal: list[Range], compared: int) -> str:
    if not common:
        return f"{names} have no sample in common: one of them consumed none"
    if unequal:
        count = sum(stop - start for start, stop in unequal)
        return f"{names}: {count:,} of {compared:,} samples differ"
    return f"{names}: the same {compared:,} samples in the same order"


def _settings(mine: History, theirs: History) -> list[tuple[str, Any, Any]]:
    """Return (name, one's, the other's) of what decides the order and is not the same."""
    x = {"batch_size": mine.batch_size, **mine.order}
    y = {"batch_size": theirs.batch_size, **theirs.order}
    names = [name for name in x if x[name] != y.get(name)]
    return [(name, _short(x[name]), _short(y.get(name))) for name in names]


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value


def padded(values: np.ndarray[Any, Any], part: slice) -> np.ndarray[Any, Any]:
    """Return values[part], zeros where it reaches past their end."""
    found = values[part]
    short = part.stop - part.start - len(found)
    return np.concatenate([found, np.zeros((short, *values.shape[1:]), values.dtype)])


def ranges_of(positions: np.ndarray[Any, Any]) -> list[Range]:
    """Return sorted positions as ranges."""
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    return [Range(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]


def samples(parts: Iterable[Range], batch_size: int, limit: int = 5) -> str:
    """Return ranges as text: `samples 8 to 11 (step 3), 16 (step 5) and 2 more`."""
    words = []
    for start, stop in (listed := list(parts))[:limit]:
        first, last = start // batch_size + 1, (stop - 1) // batch_size + 1
        which = f"{start:,}" if stop - start == 1 else f"{start:,} to {stop - 1:,}"
        steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        words.append(f"{which} ({steps})")
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return "samples " + ", ".join(words) + more
