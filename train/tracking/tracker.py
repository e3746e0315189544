"""Track a run in MLflow in a way that can neither stall nor stop the training.

    metrics() -> bounded queue -> writer thread -> spool.jsonl, fsync'd -> shipper -> MLflow

`metrics` and its sisters put one tuple into the queue and return; a full queue drops the row
and counts it. The writer thread touches the run folder only. All that knows MLflow, or a
network, is in `train.tracking.shipper`, a process of its own. What could not be shipped waits in
the spool and is shipped by the next opening of the same folder, into the same MLflow run.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import functools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from data.durable import write_atomically
from train.tracking.shipper import (
    SESSION,
    SPOOL,
    Progress,
    Session,
    read_progress,
    shipper_environment,
)
from train.tracking.system_metrics import SystemMetrics

EVENTS = "events.txt"
MAX_KEY_LEN = 250
WRITE_EVERY_S = 0.1  # what a kill -9 can cost
_NOT_IN_KEYS = re.compile(r"[^\w\-./: ]")
Status: TypeAlias = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]
# milliseconds since 1970, kind, step, values
_Queued: TypeAlias = tuple[int, str, int | None, Mapping[str, object]]


class Tracker:
    """The open tracker of a run folder; for rank 0, the others take a NoTracker.

    No method but `open` raises, and none waits, but `close` for its own limit.
    """

    def __init__(self, folder: Path, session: Session, queue_size: int, lock: IO[bytes]) -> None:
        self.folder = folder
        self._session, self._lock = session, lock
        # No queue.Queue: its lock can be held by a writer that waits for the GIL, and each put
        # would wake the writer (measured: p99 of `metrics` 5 ms, with a deque 18 us).
        self._queue: collections.deque[_Queued] = collections.deque()
        self._queue_size = queue_size
        self._dropped, self._step = 0, 0
        self._stopping, self._closed = threading.Event(), False
        self._infinite: set[str] = set()
        self._spool = (folder / SPOOL).open("ab", buffering=0)
        self._torn = self._spool.tell() > 0  # by a crash; one empty line too many does no harm
        self._shipper: subprocess.Popen[bytes] | None = None
        self._restart_at, self._restart_delay_s = 0.0, 5.0
        self._put("status", None, {"status": "RUNNING", "session": session.session})
        self._writer = threading.Thread(target=self._write, name="tracker-writer", daemon=True)
        self._writer.start()
        self._system: SystemMetrics | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        experiment: str,
        run_name: str,
        uri: str | None = None,
        queue_size: int = 10_000,
        system_every_s: float = 10.0,
        drain_s: float = 60.0,
    ) -> Tracker:
        """Return the tracker of `folder`, which goes on with the MLflow run recorded there.

        uri: None takes MLFLOW_TRACKING_URI, else a sqlite store in `folder`/tracking.
        queue_size: rows. system_every_s: 0 samples no system metrics. drain_s: how long the
        shipper may outlive this process. ValueError: another tracker is open on this folder.
        """
        tracking = Path(os.path.abspath(folder)) / "tracking"
        tracking.mkdir(parents=True, exist_ok=True)
        lock = _lock(tracking)
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        session = Session(
            session=uuid.uuid4().hex,
            uri=uri or f"sqlite:///{tracking / 'mlflow.db'}",
            experiment=experiment,
            run_name=run_name,
            embedded=uri is None,
            started_ms=time.time_ns() // 1_000_000,
            drain_s=drain_s,
        )
        write_atomically(tracking / SESSION, json.dumps(asdict(session)), mode=0o600)
        tracker = cls(tracking, session, queue_size, lock)
        os.register_at_fork(after_in_child=functools.partial(_forget, weakref.ref(tracker)))
        if system_every_s > 0:
            tracker._system = SystemMetrics(tracker._log_system, tracking, system_every_s)
        return tracker

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step; nan is kept, inf is logged as nan and told as an event.

        MLflow would turn inf into 1.797e308. A value may be a 0-dim tensor: the writer thread
        reads it, so a GPU is waited for there and not here.
        """
        self._step = step
        self._put("metrics", step, values)

    def params(self, values: Mapping[str, object]) -> None:
        """Log hyperparameters; nested mappings become dotted names. The first value stays.

        MLflow refuses a changed param; the new value is kept as the tag `changed.<name>`.
        """
        self._put("params", None, values)

    def tags(self, values: Mapping[str, object]) -> None:
        """Set tags; a later value replaces an earlier one."""
        self._put("tags", None, values)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file or folder into the artifact folder, as it is when its turn comes."""
        self._put("artifact", None, {"path": path, "folder": folder})

    def event(self, text: str, step: int) -> None:
        """Add a line to events.txt, an artifact too; the tag `event` shows the last one."""
        self._put("event", step, {"text": text})

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None until the shipper reached the store for the first time."""
        return read_progress(self.folder).run_id

    @property
    def uri(self) -> str:
        """The tracking URI in use, without a user's name or password."""
        return without_password(self._session.uri)

    @property
    def url(self) -> str | None:
        """The run's page at the server; None before it exists and where there is no server."""
        return run_url(self.uri, read_progress(self.folder))

    @property
    def dropped(self) -> int:
        """Rows that were lost: the queue was full, or a row was malformed."""
        return self._dropped

    @property
    def spooled(self) -> int:
        """Bytes on disk that the shipper has not delivered yet."""
        with contextlib.suppress(OSError):
            size = (self.folder / SPOOL).stat().st_size
            return max(0, size - read_progress(self.folder).offset)
        return 0

    @property
    def problem(self) -> str | None:
        """Why nothing is being shipped, None while all is well."""
        return read_progress(self.folder).problem

    def close(self, timeout_s: float = 10.0, status: Status = "FINISHED") -> None:
        """Write out the queue, and wait up to `timeout_s` for the shipper to deliver it.

        status: that of the MLflow run, SCHEDULED for a job that will be requeued. A
        shipper that needs longer goes on by itself for `drain_s`; the rest stays in the spool.
        """
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + timeout_s
        if self._system is not None:
            self._system.stop()
        if self._dropped:
            self._put("tags", None, {"tracking.dropped": self._dropped}, last=True)
        values = {"status": status, "session": self._session.session}
        self._put("status", None, values, last=True)
        self._stopping.set()
        self._writer.join(max(0.0, deadline - time.monotonic()))
        if not self._writer.is_alive():
            self._spool.close()
        self.release()
        if self._shipper is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._shipper.wait(max(0.0, deadline - time.monotonic()))

    def release(self) -> None:
        """Let go of the folder's lock and the shipper's lifeline; ends no shipping."""
        self._lock.close()
        if self._shipper is not None and self._shipper.stdin is not None:
            self._shipper.stdin.close()

    def _put(
        self, kind: str, step: int | None, values: Mapping[str, object], *, last: bool = False
    ) -> None:
        try:
            if not last and (self._closed or len(self._queue) >= self._queue_size):
                self._dropped += 1
                return
            self._queue.append((time.time_ns() // 1_000_000, kind, step, dict(values)))
        except Exception:
            self._dropped += 1

    def _log_system(self, values: Mapping[str, float]) -> None:
        self._put("metrics", self._step, values)

    def _write(self) -> None:
        """Carry rows from the queue to the spool until closed; keep a shipper alive."""
        lines: list[str] = []
        while True:
            stopping = self._stopping.wait(WRITE_EVERY_S if not lines else 1.0)
            lines = lines or self._take()
            try:
                if lines:
                    self._append(lines)
                lines = []
            except OSError:  # a full disk, say: the queue holds what comes until there is room
                self._torn = True
                with contextlib.suppress(OSError):  # a server that was lost: the old one stays so
                    spool = (self.folder / SPOOL).open("ab", buffering=0)
                    self._spool.close()
                    self._spool = spool
            with contextlib.suppress(Exception):
                self._keep_shipper()
            if stopping and (lines or not self._queue):
                self._dropped += len(lines) + len(self._queue)
                return

    def _take(self) -> list[str]:
        """Return the lines of the rows in the queue, of 1000 at most."""
        lines: list[str] = []
        for _ in range(min(len(self._queue), 1000)):
            row = self._queue.popleft()
            try:
                lines += [json.dumps(line) for line in self._encode(*row)]
            except Exception:  # a value that is no number: one row less
                self._dropped += 1
        return lines

    def _append(self, lines: list[str]) -> None:
        data = ("\n" * self._torn + "\n".join(lines) + "\n").encode()
        if self._spool.write(data) != len(data):
            raise OSError("short write")
        os.fsync(self._spool.fileno())
        self._torn = False

    def _encode(
        self, t: int, kind: str, step: int | None, values: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the spool's rows of one queued row."""
        rows: list[dict[str, Any]] = []
        if kind == "event":
            text = f"step {step}: {values['text']}"
            with (self.folder / EVENTS).open("a") as file:
                file.write(time.strftime("%FT%TZ ", time.gmtime(t / 1000)) + text + "\n")
            rows += self._encode(t, "tags", step, {"event": text})
            kind, values = "artifact", {"path": str(self.folder / EVENTS), "folder": ""}
        elif kind == "metrics" and step is not None:
            step = int(step)
            values = {_key(name): float(value) for name, value in values.items()}
            for name in [name for name, value in values.items() if math.isinf(value)]:
                if name not in self._infinite:
                    self._infinite.add(name)
                    text = f"{name} is {values[name]}; its infinities are logged as nan"
                    rows += self._encode(t, "event", step, {"text": text})
                values[name] = math.nan
        elif kind == "artifact":
            values = {"path": os.path.abspath(values["path"]), "folder": values["folder"]}
        elif kind in ("params", "tags"):
            values = {_key(name): str(value) for name, value in _flat(values)}
        return [*rows, {"t": t, "kind": kind, "step": step, "values": values}]

    def _keep_shipper(self) -> None:
        """Start the shipper, again where it died: at once, then after 5 s, 10 s, ... 10 min."""
        running = self._shipper is not None and self._shipper.poll() is None
        if running or time.monotonic() < self._restart_at:
            return
        self._restart_at = time.monotonic() + self._restart_delay_s
        self._restart_delay_s = min(2 * self._restart_delay_s, 600.0)
        with (self.folder / "shipper.log").open("ab") as log:
            self._shipper = subprocess.Popen(
                [sys.executable, "-P", "-m", "train.tracking.shipper", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                bufsize=0,
                env=shipper_environment(),
                start_new_session=True,  # Ctrl-C is for the trainer
            )


class NoTracker:
    """The tracker of the other ranks, and of tracking.enabled=false: does nothing."""

    run_id: str | None = None
    url: str | None = None
    problem: str | None = None
    dropped = spooled = 0

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def params(self, values: Mapping[str, object]) -> None:
        """Do nothing."""

    def tags(self, values: Mapping[str, object]) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def event(self, text: str, step: int) -> None:
        """Do nothing."""

    def close(self, timeout_s: float = 10.0, status: Status = "FINISHED") -> None:
        """Do nothing."""


def _lock(folder: Path) -> IO[bytes]:
    """Return the held lock of a tracking folder; ValueError where another tracker holds it."""
    file = (folder / "tracker.lock").open("ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"run_dir={folder.parent} is being tracked by another process; wait until that one"
            " ends, or give this run another run_dir"
        ) from None
    except OSError:
        pass  # a file system without locks is no reason not to train
    return file


def without_password(uri: str) -> str:
    """Return a tracking URI without a user's name or password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def run_url(uri: str, progress: Progress) -> str | None:
    """Return a run's page at its server; None before it exists and where there is no server."""
    if progress.run_id is None or not uri.startswith(("http://", "https://")):
        return None
    page = f"experiments/{progress.experiment_id}/runs/{progress.run_id}"
    return f"{uri.rstrip('/')}/#/{page}"


def _forget(tracker: weakref.ref[Tracker]) -> None:
    """Let go, in a forked child, of what must end with the trainer: the lock and the lifeline.

    A data worker that outlives a killed trainer would hold both.
    """
    if (found := tracker()) is not None:
        found.release()


def _key(name: str) -> str:
    """Return the nearest name that MLflow takes."""
    return _NOT_IN_KEYS.sub("_", str(name))[:MAX_KEY_LEN]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted name, value) of every leaf."""
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs
