"""`longhaul pretrain --fresh`: begin again in an empty folder, once for the job that asks for it.

A requeued job runs the same line again, and must go on with what it began. That it began is written
into the run folder: a job can be requeued before its ranks ever started.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

from data.durable import write_atomically
from train.cluster.attempts import is_note, take_along
from train.cluster.submission import SCRIPT_NAME
from train.starting.lock import LOCK

MARKER = "fresh.json"
"""Says which job began the run in its folder again."""


def begun_before(run_dir: Path) -> bool:
    """Return whether an earlier attempt of this very job, or of this torchrun, began again already.

    The restarts are counted too: in an allocation of one's own a second --fresh is a new wish.
    """
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    if all(os.environ.get(count, "0") in ("", "0") for count in counts):
        return False
    job = os.environ.get("SLURM_JOB_ID")
    return job is None or job == _job_of(run_dir)


def begin_again(run_dir: Path) -> Path | None:
    """Set an old run folder aside and return where it is now, None where there was none.

    In a job of SLURM the new folder has the job's script, its open attempt, and a mark that the
    job has begun again.
    """
    job = os.environ.get("SLURM_JOB_ID")
    aside = set_aside(run_dir)
    if job is None:
        return aside
    run_dir.mkdir(parents=True, exist_ok=True)
    if aside is not None:
        take_along(aside, run_dir, job)
        if (aside / SCRIPT_NAME).exists():
            shutil.copy2(aside / SCRIPT_NAME, run_dir)
    # Last: without it, the next attempt begins again, and finds nothing to set aside.
    write_atomically(run_dir / MARKER, json.dumps({"job": job}))
    return aside


def set_aside(folder: Path) -> Path | None:
    """Return where a run folder was moved to, None where no run has written into it.

    The name is the folder's with the time, so nothing of an old run is ever overwritten.
    """
    if not folder.is_dir() or all(_is_a_jobs(path.name) for path in folder.iterdir()):
        return None
    stem = f"{folder.name}.{time.strftime('%Y-%m-%dT%H-%M-%S')}"
    aside, number = folder.with_name(stem), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{stem}-{number}")
    folder.rename(aside)
    return aside


def _is_a_jobs(name: str) -> bool:
    return is_note(name) or name in (SCRIPT_NAME, MARKER, LOCK)


def _job_of(run_dir: Path) -> str | None:
    try:
        return str(json.loads((run_dir / MARKER).read_text())["job"])
    except FileNotFoundError:
        return None
