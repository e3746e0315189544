"""One set of ranks a run folder: rank 0 holds a lock on it for as long as its process lives.

A second start while the ranks of the first still train would write its checkpoints, log and ledger
between theirs.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

LOCK = "run.lock"
_held: dict[Path, IO[str]] = {}


def hold(run_dir: Path) -> None:
    """Lock a run folder until this process ends, or `release`; another call by it changes nothing.

    The folder is made if need be. Where its file system has no locks there is none. Raises
    ValueError where another process, of this node or another, holds it.
    """
    if run_dir in _held:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / LOCK).open("a+")
    try:
        # A lock of this process: what it forks does not inherit, and so not prolong it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = _described(file.read())
        file.close()
        raise ValueError(
            f"run_dir={run_dir}: {holder} trains this run now; wait until it ends, end it, or"
            " give this run another run_dir"
        ) from error
    except OSError:
        pass  # a file system without locks is no reason not to train
    file.truncate(0)
    who = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    file.write(json.dumps(who))
    file.flush()
    _held[run_dir] = file


def release(run_dir: Path) -> None:
    """Unlock a folder that this process holds, as before it is renamed."""
    file = _held.pop(run_dir, None)
    if file is not None:
        file.close()


def _described(text: str) -> str:
    try:
        who = json.loads(text)
        since = time.strftime("%H:%M", time.localtime(who["since"]))
        return f"process {who['pid']} on {who['host']}, since {since},"
    except (ValueError, KeyError, TypeError):
        return "another process"
