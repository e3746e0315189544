"""Ship the spool of a run to MLflow, in a process of its own beside the trainer.

A process of its own because importing mlflow alone costs 4.6 s of CPU under the GIL, and
because a server that hangs must hang nobody else. `train.tracking.tracker` starts it; by hand it
replays what was left behind (the server was away until after the end):

    python -P -m train.tracking.shipper RUN_FOLDER/tracking </dev/null

stdin is the lifeline: its end means that the trainer closed or died, and the shipper then
ships what is left, for `drain_s` seconds at most. Delivery is at least once: MLflow keeps one
copy of an identical (key, value, timestamp, step), so a replay makes no duplicates.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from data.durable import write_atomically
from train.tracking.rows import rows_of

if TYPE_CHECKING:
    from mlflow.entities import Run

SPOOL, PROGRESS, SESSION, RUN_ID = "spool.jsonl", "shipped.json", "session.json", "run_id"
REFUSED, LOCK, EMBEDDED_ARTIFACTS = "refused.jsonl", "shipper.lock", "artifacts"
POLL_S, MAX_BACKOFF_S = 1.0, 60.0
CHUNK_BYTES = 1 << 18
# The server's own limits (mlflow.utils.validation, 3.17).
MAX_METRICS, MAX_PARAMS_TAGS, MAX_PARAM_LEN, MAX_TAG_LEN = 1000, 100, 6000, 8000

Row = dict[str, Any]  # one line of the spool: t (ms), kind, step, values
T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """What one opening of the tracker asks for; written by the tracker, read by the shipper."""

    session: str
    uri: str
    experiment: str
    run_name: str
    embedded: bool
    started_ms: int
    drain_s: float


@dataclass(frozen=True)
class Progress:
    """How far the spool is shipped, and into which run; one file, so both change together."""

    key: str  # a tag of the run: a create_run whose answer was lost is found again by it
    offset: int = 0
    run_id: str | None = None
    experiment_id: str | None = None
    problem: str | None = None


class RunGoneError(Exception):
    """The run was deleted at the server."""


class RefusedError(Exception):
    """The server will never take this batch."""


def read_progress(folder: Path) -> Progress:
    """Return the progress of a tracking folder, a fresh one where there is none to be read."""
    try:
        return Progress(**json.loads((folder / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError):
        return Progress(key=uuid.uuid4().hex)


def shipper_environment() -> dict[str, str]:
    """Return the environment of a process that imports this package from where it lies."""
    path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def read_rows(spool: Path, offset: int) -> tuple[list[Row], int]:
    """Return the complete rows after byte `offset` and the offset behind them.

    A row that a crash tore in the middle of a write is passed over.
    """
    with spool.open("rb") as file:
        file.seek(offset)
        data = file.read(CHUNK_BYTES)
        if b"\n" not in data:
            data += file.readline()
    data = data[: data.rfind(b"\n") + 1]
    return rows_of(data.split(b"\n")), offset + len(data)


def slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield `items` in consecutive slices of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class MlflowRun:
    """The MLflow run of one tracking folder: found, or created, when the first row comes."""

    def __init__(self, folder: Path, session: Session) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._error = MlflowException
        self._folder, self._session = folder, session
        self._client = MlflowClient(tracking_uri=session.uri)
        self._run_id = ""
        self._params: dict[str, str] = {}

    def attach(self, progress: Progress) -> Progress:
        """Return `progress` bound to a live run; offset 0 where that run is another one."""
        run = self._find(progress.run_id) if progress.run_id else None
        if run is None:
            run = self._search_or_create(progress.key)
            progress = replace(progress, offset=0)
        self._run_id, self._params = run.info.run_id, dict(run.data.params)
        return replace(progress, run_id=self._run_id, experiment_id=run.info.experiment_id)

    def send(self, rows: Sequence[Row]) -> None:
        """Log metrics, params and tags; RefusedError where the server will never take them."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [
            Metric(key, value, row["t"], row["step"])
            for row in rows
            if row["kind"] == "metrics"
            for key, value in row["values"].items()
        ]
        new, tags = self._sort_params(rows)
        try:
            for batch in slices(metrics, MAX_METRICS):
                self._client.log_batch(self._run_id, metrics=batch)
            for pairs in slices(list(new.items()), MAX_PARAMS_TAGS):
                self._client.log_batch(self._run_id, params=[Param(*pair) for pair in pairs])
            for pairs in slices(list(tags.items()), MAX_PARAMS_TAGS):
                self._client.log_batch(self._run_id, tags=[RunTag(*pair) for pair in pairs])
        except self._error as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunGoneError(self._run_id) from error
            if error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                # A deleted run answers with the same code as a bad row.
                if self._find(self._run_id) is None:
                    raise RunGoneError(self._run_id) from error
                raise RefusedError(str(error)) from error
            raise
        self._params.update(new)

    def set_status(self, status: str) -> None:
        """Set RUNNING, or one of MLflow's final states, which also sets the end time."""
        if status == "RUNNING":
            self._client.update_run(self._run_id, status=status)
        else:
            self._client.set_terminated(self._run_id, status=status)

    def upload(self, path: Path, folder: str) -> None:
        """Upload a file or folder; RefusedError where this fails though the server answers.

        Metrics wait behind an artifact, so an artifact store without its driver must not hold
        them for ever.
        """
        if not path.exists():
            raise RefusedError(f"{path} is not there any more")
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        try:
            log(self._run_id, str(path), folder or None)
        except Exception as error:
            if self._find(self._run_id) is None:
                raise RunGoneError(self._run_id) from error
            raise RefusedError(f"{path}: {error}") from error

    def _sort_params(self, rows: Sequence[Row]) -> tuple[dict[str, str], dict[str, str]]:
        """Return the params MLflow does not have yet, and the tags.

        MLflow refuses a changed param (a run resumed with more steps, say): it becomes a tag.
        """
        new: dict[str, str] = {}
        tags: dict[str, str] = {}
        for row in rows:
            if row["kind"] == "tags":
                tags |= {key: value[:MAX_TAG_LEN] for key, value in row["values"].items()}
            elif row["kind"] == "params":
                for key, value in row["values"].items():
                    value = value[:MAX_PARAM_LEN]
                    known = (self._params | new).get(key)
                    if known is None:
                        new[key] = value
                    elif known != value:
                        tags[f"changed.{key}"[:250]] = value
        return new, tags

    def _find(self, run_id: str) -> Run | None:
        try:
            run = self._client.get_run(run_id)
        except self._error as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _search_or_create(self, key: str) -> Run:
        name = self._session.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            artifacts = self._folder / EMBEDDED_ARTIFACTS
            location = artifacts.as_uri() if self._session.embedded else None
            experiment_id = self._client.create_experiment(name, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        query = f"tags.`longhaul.key` = '{key}'"
        for found in self._client.search_runs([experiment_id], query, max_results=1):
            return found
        started, run_name = self._session.started_ms, self._session.run_name
        tags = {"longhaul.key": key}
        return self._client.create_run(experiment_id, started, tags, run_name)


class Shipper:
    """Carries rows from the spool to the run, and remembers how far it came."""

    def __init__(self, folder: Path, session: Session) -> None:
        self._folder, self._session = folder, session
        self._progress = read_progress(folder)
        self._run: MlflowRun | None = None
        self._status: tuple[str, str] | None = None  # the last status shipped, its session

    def ship(self) -> bool:
        """Ship one chunk; True when nothing is left. Raises what the server or store raises."""
        spool = self._folder / SPOOL
        size = spool.stat().st_size if spool.exists() else 0
        if size < self._progress.offset:  # another spool than the one that was shipped
            self._progress = replace(self._progress, offset=0)
        if size == self._progress.offset:
            return True
        if self._run is None:
            run = MlflowRun(self._folder, self._session)
            self._commit(run.attach(self._progress))
            self._run = run
        rows, end = read_rows(spool, self._progress.offset)
        done = end == self._progress.offset  # no more than the start of a line
        try:
            self._deliver(self._run, rows)
        except RunGoneError:
            self._run = None
            raise
        self._commit(replace(self._progress, offset=end, problem=None))
        return done

    def end(self) -> None:
        """Mark the run KILLED where this session's trainer went without a word."""
        if self._run is not None and self._status == ("RUNNING", self._session.session):
            self._run.set_status("KILLED")

    def report(self, error: BaseException) -> None:
        """Keep the reason for which nothing is shipped where the trainer can read it."""
        lines = str(error).strip().splitlines() or [""]
        text = re.sub(r"//[^/@\s]+@", "//", lines[0])  # a URI with a password
        problem = f"{type(error).__name__}: {text[:300]}"
        if problem != self._progress.problem:
            print(time.strftime("%F %T"), problem, file=sys.stderr, flush=True)
            self._commit(replace(self._progress, problem=problem))

    def _deliver(self, run: MlflowRun, rows: Sequence[Row]) -> None:
        self._send(run, [row for row in rows if row["kind"] in ("metrics", "params", "tags")])
        uploads = {json.dumps(row["values"]): row for row in rows if row["kind"] == "artifact"}
        for row in uploads.values():
            try:
                run.upload(Path(row["values"]["path"]), row["values"]["folder"])
            except RefusedError as error:
                self._refuse(row, error)
        statuses = [row["values"] for row in rows if row["kind"] == "status"]
        if statuses:
            run.set_status(statuses[-1]["status"])
            self._status = (statuses[-1]["status"], statuses[-1]["session"])

    def _send(self, run: MlflowRun, rows: Sequence[Row]) -> None:
        """Send the rows; halve a refused batch until the bad row stands alone."""
        try:
            run.send(rows)
        except RefusedError as error:
            if len(rows) == 1:
                self._refuse(rows[0], error)
                return
            self._send(run, rows[: len(rows) // 2])
            self._send(run, rows[len(rows) // 2 :])

    def _refuse(self, row: Row, error: RefusedError) -> None:
        with (self._folder / REFUSED).open("a") as file:
            file.write(json.dumps(row | {"refused": str(error)}) + "\n")

    def _commit(self, progress: Progress) -> None:
        write_atomically(self._folder / PROGRESS, json.dumps(asdict(progress)), rivals=True)
        if progress.run_id and progress.run_id != self._progress.run_id:
            write_atomically(self._folder / RUN_ID, progress.run_id + "\n", rivals=True)
        self._progress = progress


class Lifeline:
    """The trainer at the other end of stdin."""

    def __init__(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._deadline: float | None = None

    @property
    def cut(self) -> bool:
        """Whether the trainer closed or died."""
        return self._deadline is not None

    @property
    def spent(self) -> bool:
        """Whether the time to ship what is left is over too."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def wait(self, seconds: float) -> None:
        """Wait, no longer than until the trainer goes."""
        if self.cut:
            time.sleep(seconds)
        elif select.select([0], [], [], seconds)[0] and not os.read(0, 4096):
            self._deadline = time.monotonic() + self._drain_s


def ship_until_cut(shipper: Shipper, lifeline: Lifeline) -> None:
    """Ship what comes; after the trainer went, what is left while time is left."""
    failures, wait_s = 0, 0.0
    while not lifeline.spent:
        lifeline.wait(wait_s)
        ending = lifeline.cut  # before the spool is looked at: all of it was written by then
        try:
            done = shipper.ship()
            if done and ending:
                shipper.end()
                return
            failures, wait_s = 0, POLL_S if done else 0.0
        except Exception as error:
            failures += 1
            shipper.report(error)
            longest = 5.0 if ending else MAX_BACKOFF_S
            wait_s = min(2.0 ** min(failures - 1, 10), longest)


def lock(folder: Path, lifeline: Lifeline) -> IO[str] | None:
    """Return the held lock of the folder; None where the trainer went while another ships."""
    file = (folder / LOCK).open("w")
    while not lifeline.spent:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lifeline.wait(0.2)
        except OSError:
            return file  # a file system without locks; two shippers cost time, never data
        else:
            return file
    return None


def main(folder: Path) -> int:
    """Ship the spool in `folder` (absolute) until stdin ends; returns the exit status."""
    # SLURM signals every process of a step; what the trainer writes in answer is still to ship.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.nice(10)  # never instead of a step
    session = Session(**json.loads((folder / SESSION).read_text()))
    if session.embedded:
        os.chdir(folder)  # the sqlite store leaves an empty `mlruns` in the working folder
    lifeline = Lifeline(session.drain_s)
    held = lock(folder, lifeline)
    if held is None:
        return 0
    shipper = Shipper(folder, session)
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        shipper.report(error)
        return 3
    ship_until_cut(shipper, lifeline)
    return 0


if __name__ == "__main__":
    os.environ |= {
        # Both matter: the defaults make one call last 247 s when the server is away.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "5"),
        "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    sys.exit(main(Path(sys.argv[1]).resolve()))
