"""How a rank's failure reaches the job's script: exit codes and reasons that torchrun loses.

A rank writes why it fails where torchrun looks for it; the launcher of its node
(train.cluster.launcher) writes the first failure of its ranks into the run folder's `attempt/`, a
file a node; the end of the attempt (train.cluster.attempts) reads which failure came first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

FOLDER = "attempt"
"""Of a run folder: what the nodes of the attempt that runs, or ran last, have to say."""

PREFLIGHT = ".preflight-"
"""What the names of files begin with by which preflight sees that it can write."""

REFUSED = 2
"""Exit code of what the user must change first; before the first step, nothing else can help."""

HUNG = 75
"""Exit code of every rank of a job that hung: EX_TEMPFAIL of sysexits.h, try again."""

_LOST_PEER = re.compile(r"connection|peer|nccl|gloo|timed out", re.IGNORECASE)
"""What a rank says that lost another one: its own node is not to blame."""


class Failure(NamedTuple):
    """The first failure of a node's ranks."""

    node: str
    rank: int | None  # None: the launcher itself
    code: int  # as Python counts: -9 is SIGKILL
    at: float  # seconds since 1970
    message: str

    @property
    def blamed(self) -> str | None:
        """The node, unless the failure may be another node's."""
        return None if precedence(self.code, self.at, self.message)[0] else self.node

    def describe(self) -> str:
        """Return a clause that says who ended of what."""
        who = "the launcher" if self.rank is None else f"rank {self.rank}"
        who += f" on {self.node}"
        if self.code == HUNG:
            return f"the job hung; the log says where ({who} ended itself)"
        if self.code >= 0:
            return f"{who} exited with {self.code}" + (f": {self.message}" * bool(self.message))
        name = signal.Signals(-self.code).name
        cause = " (out of memory on the host, or killed by hand)" if name == "SIGKILL" else ""
        return f"{who} was ended by {name}{cause}"


def precedence(code: int, at: float, message: str) -> tuple[bool, float]:
    """Return what failures are sorted by, the one that the others follow from first.

    Last come those that say themselves that they lost a peer, or were ended for one: SIGTERM is
    how torchrun ends the others, SIGABRT how NCCL's watchdog does. A rank that another signal ended
    is found a moment after those that lost it.
    """
    follows = code in (HUNG, -signal.SIGTERM, -signal.SIGABRT) or (
        code >= 0 and _LOST_PEER.search(message) is not None
    )
    return follows, at - (1.0 if code < 0 else 0.0)


def tell_launcher(error: BaseException) -> None:
    """Leave an error where torchrun looks for that of its rank; without torchrun do nothing."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    text = f"{type(error).__name__}: {error}"
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def tell_stopped(by: str) -> None:
    """Leave for the job's script that the ranks stopped because they were asked to."""
    if folder := os.environ.get("ATTEMPT_FOLDER"):
        with contextlib.suppress(OSError):
            Path(folder, "stopped").write_text(by)


def write_failure(folder: Path, failure: Failure) -> None:
    """Write a node's failure; a file system that fails too must not hide the exit code."""
    with contextlib.suppress(OSError):
        (folder / f"failure-{failure.node}.json").write_text(json.dumps(failure._asdict()))


def first_failure(folder: Path) -> Failure | None:
    """Return the failure that the others follow from, None where nobody wrote one."""
    found = []
    for path in sorted(folder.glob("failure-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Failure(**json.loads(path.read_text())))
    return min(found, key=lambda f: precedence(f.code, f.at, f.message), default=None)
