"""The events of a run, over all attempts: one line of JSON each in run_dir/events.jsonl."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from train.tracking.rows import RowFile, read_rows
from train.tracking.tracker import NoTracker, Tracker

EVENTS = "events.jsonl"
Kind: TypeAlias = Literal[
    "started", "resumed", "saved", "not_saved", "skipped", "spike", "rolled_back",
    "straggler", "warned", "left_out", "preempted", "hang", "failed", "finished",
]  # fmt: skip


class Timeline:
    """Writes events into the run folder and, once there is one, the tracker."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        """writes: whether this rank does (rank 0)."""
        self.path, self.writes = folder / EVENTS, writes
        self._file = RowFile(self.path)
        self.tracker: Tracker | NoTracker = NoTracker()
        earlier = read_events(folder)
        self._counts = Counter(event["kind"] for event in earlier)
        self._earlier = len(earlier)

    @property
    def attempt(self) -> int:
        """The number of the attempt that began last, 0 before the first."""
        return sum(event["kind"] == "started" for event in read_events(self.path.parent))

    def add(
        self,
        kind: Kind,
        step: int,
        text: str,
        facts: Mapping[str, object] | None = None,
        *,
        must: bool = False,
    ) -> None:
        """Write an event down: what happened when, in a sentence, with facts for programs.

        must: any rank does, but where one of the kind has been written since this was made. Where
        the file cannot be written, the event waits for the next one; MLflow is told at once.
        """
        if not self.writes and not (must and kind not in self._kinds_since()):
            return
        event = {"time": time.time(), "kind": kind, "step": step, "text": text, **(facts or {})}
        self._file.add(event)
        self._counts[kind] += 1
        self.tracker.event(text, step)
        self.tracker.metrics({f"events/{kind}": float(self._counts[kind])}, step)

    def _kinds_since(self) -> list[str]:
        """Return the kinds of events written since this was made, none where nothing is read."""
        try:
            return [event["kind"] for event in read_events(self.path.parent)[self._earlier :]]
        except OSError:
            return []


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return a run's events in their order."""
    return read_rows(folder / EVENTS)
