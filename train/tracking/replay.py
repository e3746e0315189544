"""A run's MLflow side by hand: ship what is left, and open the embedded store."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from data.durable import write_atomically
from train.tracking.shipper import (
    SESSION,
    SPOOL,
    Session,
    read_progress,
    read_rows,
    shipper_environment,
)
from train.tracking.tracker import run_url, without_password

STORE = "mlflow.db"


class Left(NamedTuple):
    """What a replay could not deliver."""

    num_bytes: int
    problem: str | None
    where: str

    def describe(self) -> str:
        """Return it as a sentence."""
        if self.num_bytes == 0:
            return f"all is at {self.where}"
        why = self.problem or "another process ships it just now; wait for it"
        return f"{self.num_bytes:,} bytes are not yet at {self.where}: {why}"


def read_session(run: Path) -> Session:
    """Return what the run's tracker was opened with; ValueError where it never was."""
    try:
        return Session(**json.loads((run / "tracking" / SESSION).read_text()))
    except (OSError, ValueError, TypeError):
        raise ValueError(
            f"{run} has no tracking/{SESSION}: it is no run's folder, or its run had"
            " tracking.enabled=false"
        ) from None


def replay(run: Path, timeout_s: float) -> Left:
    """Ship what the run's spool still holds, for so long at most; return what is left.

    ValueError where the run was not tracked.
    """
    session, folder = read_session(run), (run / "tracking").resolve()
    if _left(folder):
        text = json.dumps(asdict(replace(session, drain_s=timeout_s)))
        write_atomically(folder / SESSION, text, mode=0o600, rivals=True)
        subprocess.run(
            [sys.executable, "-P", "-m", "train.tracking.shipper", str(folder)],
            stdin=subprocess.DEVNULL,  # the trainer went: ship the rest, and end
            env=shipper_environment(),
            check=False,
        )
    progress, where = read_progress(folder), without_password(session.uri)
    url = run_url(where, progress)
    return Left(_left(folder), progress.problem, url or where)


def open_ui(run: Path, host: str, port: int, say: Callable[[str], None]) -> int:
    """Run MLflow's UI on the run's own store until it is stopped; return its exit code."""
    session, folder = read_session(run), (run / "tracking").resolve()
    if not session.embedded:
        where = without_password(session.uri)
        say(f"{run} logs to {run_url(where, read_progress(folder)) or where}")
        return 0
    if not (folder / STORE).exists():
        say(f"{folder / STORE} is not there yet: longhaul track sync {run} makes it")
        return 1
    say(f"MLflow on {folder / STORE}: http://{host}:{port} (Ctrl-C ends it)")
    command = [sys.executable, "-P", "-m", "mlflow", "ui", "--host", host, "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder / STORE}", "--workers", "1"]
    try:
        ended = subprocess.run(command, cwd=folder, env=shipper_environment(), check=False)
    except KeyboardInterrupt:
        return 0
    return ended.returncode


def _left(folder: Path) -> int:
    """Return the bytes of the spool that are not shipped, a row cut short by a crash left out."""
    spool, offset = folder / SPOOL, read_progress(folder).offset
    if not spool.exists() or read_rows(spool, offset)[1] == offset:
        return 0
    return spool.stat().st_size - offset
