"""The attempts at a run: what its job script wrote down, else what its timeline tells."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from train.tracking.rows import read_rows

ATTEMPTS = "attempts.jsonl"
_ENDS = {
    "finished": "done",
    "preempted": "stopped",
    "failed": "failed",
    "hang": "failed",
}


class Attempt(NamedTuple):
    """One attempt; None: not known, or it still runs."""

    number: int
    job: str | None
    nodes: list[str]
    started: float | None  # seconds since 1970
    from_step: int | None
    ended: float | None
    step: int | None  # at its end
    status: str | None  # done, stopped, failed
    reason: str | None


def read_attempts(folder: Path, events: Iterable[dict[str, Any]]) -> list[Attempt]:
    """Return a run's attempts in their order."""
    rows = read_rows(folder / ATTEMPTS)
    return _from_rows(rows) if rows else _from_events(events)


def _from_rows(rows: Iterable[dict[str, Any]]) -> list[Attempt]:
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(int(row["attempt"]), {}).update(row)
    return [
        Attempt(
            number,
            row.get("job"),
            list(row.get("nodes") or []),
            _seconds(row.get("started")),
            row.get("from_step"),
            _seconds(row.get("ended")),
            row.get("step"),
            row.get("status"),
            row.get("reason"),
        )
        for number, row in sorted(found.items())
    ]


def _from_events(events: Iterable[dict[str, Any]]) -> list[Attempt]:
    found: list[Attempt] = []
    for event in events:
        kind = event["kind"]
        if kind == "started":
            number = event.get("attempt", len(found) + 1)
            place = (event.get("job"), list(event.get("nodes") or []))
            found.append(Attempt(number, *place, event["time"], event["step"], *[None] * 4))
        elif found and kind in _ENDS and found[-1].status is None:
            found[-1] = found[-1]._replace(
                ended=event["time"],
                step=event["step"],
                status=_ENDS[kind],
                reason=event["text"].partition("\n")[0],
            )
    return found


def _seconds(iso: str | None) -> float | None:
    return None if iso is None else datetime.fromisoformat(iso).timestamp()
