"""Where a run stands, from the files in its folder alone."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from train.checkpoints.manifest import BadCheckpoint, read_manifest
from train.checkpoints.names import list_checkpoints, step_of
from train.tracking.progress import duration, percent, short
from train.tracking.rows import read_rows
from train.tracking.timeline import read_events
from train.watch.attempts import Attempt, read_attempts

_TAIL_BYTES = 1 << 16
"""Of log.jsonl: some 300 steps, so a run of a million is looked at as fast as one of ten."""
_RECENT = 50
_QUIET = 10
"""Recent steps' time without a new one after which a run does not count as running."""
_LEAST_QUIET_S = 120.0
_EVENTS_SHOWN = 8
_ATTEMPTS_SHOWN = 5

NEXT = {
    "failed": "mend what it says, then start the same command again: it goes on from the"
    " checkpoint above",
    "hung": "start the same command again; where a node is suspected again, leave it out",
    "stopped": "start the same command again (slurm/ requeues by itself)",
    "silent": "see whether its job still runs (squeue) and read the end of its log; the same"
    " command goes on from the checkpoint above",
    "not begun": "wait for its first step, or read its log",
}


class Checkpoint(NamedTuple):
    """The newest checkpoint whose manifest can be read."""

    step: int
    path: str
    saved: float  # seconds since 1970


class Standing(NamedTuple):
    """Where a run stands; None: not known."""

    run: str
    name: str
    state: str  # finished, running, stopped, failed, hung, silent, not begun
    reason: str | None
    step: int
    steps: int | None
    tokens: int | None  # consumed
    loss: float | None
    tokens_per_s: float | None
    mfu: float | None
    step_s: float | None
    last_step_at: float | None  # seconds since 1970
    eta_s: float | None
    checkpoint: Checkpoint | None
    attempts: list[Attempt]
    events: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return it as values for programs."""
        values = self._asdict()
        values["checkpoint"] = self.checkpoint and self.checkpoint._asdict()
        values["attempts"] = [attempt._asdict() for attempt in self.attempts]
        return values


def read_standing(folder: Path, now: float | None = None) -> Standing:
    """Return where the run in a folder stands; ValueError where there is none.

    now: seconds since 1970.
    """
    now = time.time() if now is None else now
    events, config = read_events(folder), _read_config(folder)
    rows = read_rows(folder / "log.jsonl", _TAIL_BYTES)
    if not (events or config or rows):
        raise ValueError(
            f"{folder} is no run's folder (it has no config.yaml, log.jsonl or events.jsonl); name"
            " one, such as runs/quickstart"
        )
    started = max((e["time"] for e in events if e["kind"] == "started"), default=0.0)
    recent = [row for row in rows if row["time"] >= started][-_RECENT:]
    last = rows[-1] if rows else None
    step = last["step"] if last else 0
    train, data = config.get("train", {}), config.get("data", {})
    steps: int | None = train.get("steps")
    per_step = train.get("batch_size", 0) * data.get("sample_len", 0)
    step_s = _step_seconds(recent)
    state, reason = _state(folder, events, recent, step_s, now)
    running = state == "running" and step_s is not None and steps is not None
    return Standing(
        run=str(folder),
        name=config.get("name", folder.name),
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        tokens=step * per_step or None,
        loss=last["loss"] if last else None,
        tokens_per_s=median(row["tokens_per_s"] for row in recent) if recent else None,
        mfu=median(row["mfu"] for row in recent) if recent else None,
        step_s=step_s,
        last_step_at=last["time"] if last else None,
        eta_s=step_s * (steps - step) if running and step_s and steps else None,
        checkpoint=_newest_checkpoint(folder),
        attempts=read_attempts(folder, events),
        events=events,
    )


def describe(standing: Standing, now: float | None = None) -> list[str]:
    """Return the lines of `longhaul status`."""
    now = time.time() if now is None else now
    done = f"step {standing.step:,}"
    if standing.steps:
        done += f" of {standing.steps:,} ({percent(standing.step / standing.steps)})"
    if standing.tokens:
        done += f", {short(standing.tokens)} tokens"
    lines = [("run", f"{standing.name} ({standing.run})"), ("state", standing.state)]
    if standing.reason:
        lines.append(("reason", standing.reason))
    lines.append(("progress", done))
    if standing.last_step_at is not None:
        lines.append(("last step", f"{duration(now - standing.last_step_at)} ago"))
    if standing.loss is not None:
        lines.append(("loss", f"{standing.loss:.4f}"))
    if standing.tokens_per_s is not None and standing.mfu is not None:
        rate = f"{short(standing.tokens_per_s)} tokens/s, MFU {percent(standing.mfu)}"
        lines.append(("speed", rate))
    if standing.eta_s is not None:
        lines.append(("eta", duration(standing.eta_s)))
    saved = standing.checkpoint
    text = f"step {saved.step:,}, {duration(now - saved.saved)} ago: {saved.path}" if saved else ""
    lines.append(("checkpoint", text or "none"))
    if standing.state in NEXT:
        lines.append(("what to do", NEXT[standing.state]))
    width = max(len(name) for name, _ in lines)
    shown = [f"{name.ljust(width)}  {text}" for name, text in lines]
    shown += _section("attempts", [_attempt(a, now) for a in standing.attempts], _ATTEMPTS_SHOWN)
    return shown + _section("events", [_event(event) for event in standing.events], _EVENTS_SHOWN)


def _section(title: str, lines: list[str], limit: int) -> list[str]:
    """Return the last lines of a list under its title."""
    if not lines:
        return []
    more = f" (the last {limit} of {len(lines)})" if len(lines) > limit else ""
    return ["", f"{title}{more}", *(f"  {line}" for line in lines[-limit:])]


def _attempt(attempt: Attempt, now: float) -> str:
    words = [f"{attempt.number}"]
    if attempt.job is not None:
        words.append(f"job {attempt.job}")
    if attempt.nodes:
        some, more = attempt.nodes[:4], len(attempt.nodes) - 4
        words.append(f"on {' '.join(some)}{f' and {more} more' if more > 0 else ''}")
    words.append(f"from step {attempt.from_step or 0:,}")
    if attempt.step is not None:
        words.append(f"to {attempt.step:,}")
    if attempt.started is not None:
        words.append(f"for {duration((attempt.ended or now) - attempt.started)}")
    if attempt.status is not None:
        words.append(f"{attempt.status}{f': {attempt.reason}' if attempt.reason else ''}")
    return ", ".join(words)


def _event(event: dict[str, Any]) -> str:
    when = time.strftime("%F %T", time.localtime(event["time"]))
    return f"{when}  {event['kind']:<11}  {event['text'].partition(chr(10))[0]}"


def _state(
    folder: Path,
    events: list[dict[str, Any]],
    recent: list[dict[str, Any]],
    step_s: float | None,
    now: float,
) -> tuple[str, str | None]:
    """Return the state and, where it has one, its reason."""
    ends = {"hang": "hung", "failed": "failed", "preempted": "stopped"}
    for event in reversed(events):
        if event["kind"] in ends:
            return ends[event["kind"]], event["text"]
        if event["kind"] in ("started", "finished"):
            break
    if (folder / "DONE").exists():
        return "finished", None
    # What was last heard of: a save or an evaluation may take longer than a step.
    heard = max([e["time"] for e in events[-1:]] + [row["time"] for row in recent[-1:]], default=0)
    limit = max(_LEAST_QUIET_S, _QUIET * (step_s or 0))
    if now - heard > limit:
        return "silent", f"nothing was written for {duration(now - heard)}"
    return ("running", None) if recent else ("not begun", None)


def _step_seconds(rows: list[dict[str, Any]]) -> float | None:
    """Return the mean time from step to step: evaluations and saves are in it."""
    if len(rows) < 2 or rows[-1]["step"] == rows[0]["step"]:
        return None
    seconds, steps = (rows[-1][name] - rows[0][name] for name in ("time", "step"))
    return float(seconds / steps)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return config.yaml's values, whatever version wrote it; none where it cannot be read."""
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _newest_checkpoint(folder: Path) -> Checkpoint | None:
    for path in reversed(list_checkpoints(folder / "checkpoints")):
        try:
            read_manifest(path)
            return Checkpoint(step_of(path), str(path), (path / "manifest.json").stat().st_mtime)
        except (BadCheckpoint, OSError):
            continue  # a resume passes over it too
    return None
