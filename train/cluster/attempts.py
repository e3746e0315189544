"""A run's attempts, and whether there should be another: attempts.jsonl in the run folder.

A line when an attempt begins, a line when it ends:

    {"attempt": 2, "job": "4711", "nodes": ["n1", "n2"], "started": "...", "from_step": 500}
    {"attempt": 2, "ended": "...", "step": 731, "status": "failed", "reason": "...", "node": "n2"}

step: the last one done. status: done, stopped (asked to: time limit, preemption, scancel) or
failed. node: where the failure began, if known. An attempt that could not write its end (its first
node lost power) is ended by the next one. Only what is needed for this is read, so it works while
the ranks' environment is broken.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data.durable import write_atomically
from train.checkpoints.names import list_checkpoints, step_of
from train.cluster.failure import FOLDER, PREFLIGHT, REFUSED, first_failure

ATTEMPTS = "attempts.jsonl"
MAX_FAILED = 3
"""Failures of a job since it last got further than ever before: then it stops."""
MAX_IDLE = 6
"""The same, those that were stopped counted too: a time limit too short for the start, say."""
BAD_NODE_FAILURES = 2
"""Failures that began on a node before it is left out."""
_REMEDY = "Mend what fails, then submit again: the run goes on from its newest checkpoint"
_TAIL_BYTES = 65536

Status = Literal["done", "stopped", "failed"]


class Ended(NamedTuple):
    """An attempt that has ended."""

    attempt: int
    job: str | None
    step: int
    status: Status
    reason: str
    node: str | None
    preflight: bool = False


class Verdict(NamedTuple):
    """What the script does next."""

    action: Literal["done", "requeue", "stop"]
    reason: str
    exclude: tuple[str, ...] = ()


def begin(run_dir: Path, *, job: str | None, nodes: Sequence[str], lost: Sequence[str]) -> int:
    """Write down that an attempt begins, and return its number, from 1.

    lost: of an attempt that did not write its end, the nodes that SLURM says went down.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    rows = _rows(run_dir)
    numbers = [row["attempt"] for row in rows]
    if (open_row := _unended(rows)) is not None:
        if lost:
            _end(run_dir, open_row, "failed", f"node {lost[0]} went down", lost[0])
        else:
            _end(run_dir, open_row, "stopped", "SLURM ended the job without a warning", None)
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    (run_dir / FOLDER).mkdir()
    # What follows decides anew; the ranks would delete it as well, but may not get so far. Kept for
    # `take_along`: if they begin again, the run was done all the same.
    with contextlib.suppress(FileNotFoundError):
        (run_dir / "DONE").replace(run_dir / FOLDER / "DONE")
    number = max(numbers, default=0) + 1
    started = {
        "attempt": number,
        "job": job,
        "nodes": list(nodes),
        "started": _now(),
        "from_step": newest_step(run_dir),
    }
    _append(run_dir, started)
    return number


def take_along(old: Path, new: Path, job: str) -> None:
    """Move the job's open attempt, if there is one, from the folder of a run to that of the next.

    The ranks have set the old run aside, to begin at step 0: what it reached, before this job or
    in it, is no measure of whether the new one gets on.
    """
    rows = _rows(old)
    row = _unended(rows)
    if row is None or row["job"] != job:
        return
    (old / FOLDER).rename(new / FOLDER)
    _append(new, row | {"from_step": None})
    if len(rows) > 1:
        write_atomically(old / ATTEMPTS, "".join(json.dumps(each) + "\n" for each in rows[:-1]))
    else:
        (old / ATTEMPTS).unlink()
    with contextlib.suppress(FileNotFoundError):
        (new / FOLDER / "DONE").replace(old / "DONE")


def is_note(name: str) -> bool:
    """Return whether a file of this name in a run folder is a job's own, and not the run's."""
    return name in (ATTEMPTS, FOLDER) or name.startswith(PREFLIGHT)


def open_attempt(run_dir: Path) -> dict[str, Any] | None:
    """Return the line of an attempt that did not write its end, if there is one."""
    return _unended(_rows(run_dir))


def end(
    run_dir: Path,
    *,
    job: str | None,
    code: int,
    stopped_by: str | None,
    cancelled: bool,
    preflight: str | None,
    lost: Sequence[str] = (),
    writes_done: bool = True,
) -> Verdict:
    """Write down that the job's attempt ended, and return what is to be done.

    code: what the ranks ended with. stopped_by: the signal that the script or the ranks heard.
    cancelled: somebody cancelled the job. preflight: the nodes, with commas, without which too few
    were left. lost: nodes that SLURM says went down meanwhile. writes_done: the ranks leave
    DONE behind their last step, as those of `longhaul pretrain` do; else the code 0 says as much.
    """
    row, done = open_attempt(run_dir), (run_dir / "DONE").exists()
    if row is None or row["job"] != job:
        # Another attempt would not be counted either, and could so be followed for ever.
        return Verdict("done", "all steps done") if done else Verdict("stop", _not_open(run_dir))
    stopped_by = stopped_by or _read(run_dir / FOLDER / "stopped")
    ended_well = code == 0 and not stopped_by and not preflight
    if done or (ended_well and not writes_done):
        _end(run_dir, row, "done", "all steps done", None)
        return Verdict("done", "all steps done")
    if ended_well:
        # They leave a note where they were stopped, but a full disk keeps it from them.
        stopped_by = "the ranks exited with 0 and wrote no DONE"
    if preflight and not stopped_by:
        reason = f"preflight: {preflight} not fit, and too few nodes left without"
        ended = _end(run_dir, row, "failed", reason, preflight.split(",")[0], preflight=True)
        return _judged(run_dir, ended, tuple(preflight.split(",")))
    if stopped_by:
        after = "" if code == 0 else f", the ranks ended with {code} before they had saved"
        ended = _end(run_dir, row, "stopped", f"{stopped_by}{after}", None)
        return Verdict("stop", "cancelled") if cancelled else _judged(run_dir, ended)
    failure = first_failure(run_dir / FOLDER)
    if lost:
        ended = _end(run_dir, row, "failed", f"node {lost[0]} went down", lost[0])
    elif failure is None:
        ended = _end(run_dir, row, "failed", f"the ranks ended with {code}", None)
    else:
        ended = _end(run_dir, row, "failed", failure.describe(), failure.blamed)
        if failure.code == REFUSED and ended.step == (row["from_step"] or 0):
            return Verdict("stop", f"{ended.reason}; another attempt would end the same")
    return _judged(run_dir, ended)


def _not_open(run_dir: Path) -> str:
    return (
        f"{run_dir / ATTEMPTS} has no open attempt of this job: the run folder was moved or emptied"
        " while the ranks ran, or another job uses it. See that one job alone has the folder, then"
        " submit again: the run goes on from its newest checkpoint"
    )


def judge(attempts: Sequence[Ended]) -> Verdict:
    """Return whether a job whose attempts these are, the last one just ended, goes on."""
    last = attempts[-1]
    if (same := _failed_alike(attempts)) is not None:
        return Verdict(
            "stop",
            f"attempts {same} and {last.attempt} both failed after step {last.step}"
            f" ({last.reason}): it is not chance. {_REMEDY}",
        )
    best, failed, idle = -1, 0, 0
    for attempt in attempts:
        if attempt.step > best:
            best, failed, idle = attempt.step, 0, 0
        else:
            failed, idle = failed + (attempt.status == "failed"), idle + 1
    if failed >= MAX_FAILED or idle >= MAX_IDLE:
        return Verdict(
            "stop",
            f"the last {idle} attempts got no further than step {best}, the last: {last.reason}."
            f" Save more often (checkpoint.every), or ask for more time. {_REMEDY}",
        )
    blamed = Counter(attempt.node for attempt in attempts if attempt.node)
    bad = tuple(sorted(node for node, count in blamed.items() if count >= BAD_NODE_FAILURES))
    return Verdict("requeue", last.reason, bad)


def _failed_alike(attempts: Sequence[Ended]) -> int | None:
    """Return the attempt before the last one if both failed after the same step."""
    if len(attempts) < 2:
        return None
    before, last = attempts[-2:]
    alike = before.step == last.step and before.status == last.status == "failed"
    # nodes that preflight refuses are left out: the next attempt is another one
    return before.attempt if alike and not (before.preflight or last.preflight) else None


def newest_step(run_dir: Path) -> int | None:
    """Return the step of the newest checkpoint, None without one."""
    return max(map(step_of, list_checkpoints(run_dir / "checkpoints")), default=None)


def ended_attempts(run_dir: Path, job: str | None) -> list[Ended]:
    """Return the ended attempts of one job, in order."""
    started = {row["attempt"]: row for row in _rows(run_dir) if "started" in row}
    return [
        Ended(
            row["attempt"],
            job,
            row["step"],
            row["status"],
            row["reason"],
            row.get("node"),
            row.get("preflight", False),
        )
        for row in _rows(run_dir)
        if "ended" in row and started[row["attempt"]]["job"] == job
    ]


def _judged(run_dir: Path, ended: Ended, also: tuple[str, ...] = ()) -> Verdict:
    verdict = judge(ended_attempts(run_dir, ended.job))
    if verdict.action != "requeue":
        return verdict
    return verdict._replace(exclude=tuple(sorted({*verdict.exclude, *also})))


def _end(
    run_dir: Path,
    row: dict[str, Any],
    status: Status,
    reason: str,
    node: str | None,
    *,
    preflight: bool = False,
) -> Ended:
    step = _reached(run_dir, row)
    written = {
        "attempt": row["attempt"],
        "ended": _now(),
        "step": step,
        "status": status,
        "reason": reason,
        "node": node,
    }
    _append(run_dir, written | ({"preflight": True} if preflight else {}))
    return Ended(row["attempt"], row["job"], step, status, reason, node, preflight)


def _reached(run_dir: Path, row: dict[str, Any]) -> int:
    """Return the last step that the attempt did; without one, where it began."""
    since = datetime.fromisoformat(row["started"]).timestamp()
    try:
        with (run_dir / "log.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        lines = []
    whole = [line for line in lines if line.startswith("{") and line.endswith("}\n")]
    last = json.loads(whole[-1]) if whole else None
    if last is not None and last["time"] >= since:
        return int(last["step"])
    return int(row["from_step"] or 0)


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the whole lines; one cut short by a crash is left out."""
    text = _read(run_dir / ATTEMPTS) or ""
    rows = []
    for line in text.splitlines():
        if line.startswith("{") and line.endswith("}"):
            rows.append(json.loads(line))
    return rows


def _unended(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    return rows[-1] if rows and "started" in rows[-1] else None


def _append(run_dir: Path, row: dict[str, Any]) -> None:
    path = run_dir / ATTEMPTS
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
    with path.open("a") as file:
        file.write("\n" * bool(torn) + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
