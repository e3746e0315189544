"""The tracker keeps every row, continues its run, and disturbs nobody."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from train.tracking import shipper as shipping
from train.tracking.describe import describe_run, source_commit
from train.tracking.shipper import Progress, RefusedError, RunGoneError, Session, Shipper, read_rows
from train.tracking.system_metrics import SystemMetrics
from train.tracking.tracker import NoTracker, Tracker

ROOT = Path(__file__).resolve().parents[3]
# Never waited for in a good run; a loaded machine needs half a minute to import mlflow.
PATIENCE_S = 180

# Asks MLflow's own client, in one process for all tests: the import costs 5 s of CPU.
READER = """
import json, sys
from mlflow import MlflowClient
for line in sys.stdin:
    uri, run_id = json.loads(line)
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    history = {
        key: [[m.step, m.value, m.timestamp] for m in client.get_metric_history(run_id, key)]
        for key in run.data.metrics
    }
    files = {}
    for file in client.list_artifacts(run_id):
        with open(client.download_artifacts(run_id, file.path)) as text:
            files[file.path] = text.read()
    answer = {"status": run.info.status, "name": run.info.run_name, "history": history,
              "params": run.data.params, "tags": run.data.tags, "files": files}
    print(json.dumps(answer), flush=True)
"""

# A trainer that logs for ever; prints the shipper's pid when at least 50 rows are on disk.
TRAINER = """
import sys, time
from pathlib import Path
from train.tracking.tracker import Tracker
tracker = Tracker.open(Path(sys.argv[1]), experiment="e", run_name="killed", system_every_s=0)
step, told = 0, False
while True:
    tracker.metrics({"loss": 1.0 / (1 + step)}, step)
    step += 1
    time.sleep(0.002)
    if not told and step > 100 and tracker._shipper and tracker.spooled > 5000:
        print(tracker._shipper.pid, flush=True)
        told = True
"""


class Reader:
    def __init__(self) -> None:
        env = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def run(self, uri: str, run_id: str | None) -> dict[str, Any]:
        assert run_id is not None
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([uri, run_id]) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    assert reader.process.stdin is not None
    reader.process.stdin.close()
    reader.process.wait(PATIENCE_S)


@pytest.fixture(autouse=True)
def no_outside_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def open_tracker(folder: Path, **options: Any) -> Tracker:
    settings = {"experiment": "e", "run_name": "r", "system_every_s": 0.0} | options
    return Tracker.open(folder, **settings)


def embedded_uri(folder: Path) -> str:
    return f"sqlite:///{folder}/tracking/mlflow.db"


def steps_of(run: dict[str, Any], key: str = "loss") -> list[int]:
    return sorted(step for step, _, _ in run["history"][key])


def spooled_steps(folder: Path) -> list[int]:
    spool, rows, end = folder / "tracking" / "spool.jsonl", [], -1
    offset = 0
    while offset != end:
        end = offset
        more, offset = read_rows(spool, offset)
        rows += more
    return [row["step"] for row in rows if row["kind"] == "metrics"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The whole way, into MLflow's embedded store.


def test_everything_arrives_and_a_reopened_tracker_continues_the_run(
    tmp_path: Path, reader: Reader
) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    tracker = open_tracker(tmp_path, system_every_s=0.1)
    tracker.params({"train": {"steps": 2, "lr": 3e-4}, "name": "r"})
    tracker.tags({"slurm.job_id": 7})
    tracker.artifact(tmp_path / "notes.txt")
    for step in range(40):
        tracker.metrics({"loss": 1.0 / (1 + step), "odd name!": math.nan}, step)
    tracker.metrics({"grad_norm": math.inf}, 40)
    tracker.event("checkpoint saved", 40)
    wait_until(lambda: "system/" in (tmp_path / "tracking" / "spool.jsonl").read_text())
    tracker.close(PATIENCE_S)
    assert tracker.spooled == tracker.dropped == 0
    assert tracker.problem is None and tracker.url is None
    first = reader.run(tracker.uri, tracker.run_id)

    again = open_tracker(tmp_path)
    again.params({"train": {"steps": 4, "lr": 3e-4}, "new": 1})
    for step in range(40, 80):
        again.metrics({"loss": 1.0 / (1 + step)}, step)
    again.close(PATIENCE_S, status="SCHEDULED")
    assert again.run_id == tracker.run_id
    assert (tmp_path / "tracking" / "run_id").read_text().strip() == tracker.run_id
    second = reader.run(again.uri, again.run_id)

    assert first["status"] == "FINISHED" and first["name"] == "r"
    assert steps_of(first) == list(range(40))
    assert [value for _, value, _ in sorted(first["history"]["loss"])][:2] == [1.0, 0.5]
    assert all(math.isnan(value) for _, value, _ in first["history"]["odd name_"])
    assert math.isnan(first["history"]["grad_norm"][0][1])
    assert "grad_norm is inf" in first["files"]["events.txt"]
    assert first["tags"]["event"] == "step 40: checkpoint saved"
    assert first["tags"]["slurm.job_id"] == "7"
    assert first["files"]["notes.txt"] == "kept"
    assert first["params"] == {"train.steps": "2", "train.lr": "0.0003", "name": "r"}
    assert "system/cpu_utilization_percentage" in first["history"]
    assert second["status"] == "SCHEDULED"
    assert steps_of(second) == list(range(80))
    assert second["params"] == first["params"] | {"new": "1"}
    assert second["tags"]["changed.train.steps"] == "4"


@pytest.fixture
def killed_trainer(tmp_path: Path) -> Callable[[bool], int]:
    """Run TRAINER in tmp_path and kill it with SIGKILL; returns the shipper's pid."""

    def run(shipper_first: bool) -> int:
        trainer = subprocess.Popen(
            [sys.executable, "-P", "-c", TRAINER, str(tmp_path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        if shipper_first:
            os.kill(pid, signal.SIGKILL)
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
        return pid

    return run


@pytest.mark.slow
def test_a_lost_node_loses_nothing_spooled_and_the_replay_duplicates_nothing(
    tmp_path: Path, reader: Reader, killed_trainer: Callable[[bool], int]
) -> None:
    killed_trainer(True)
    with (tmp_path / "tracking" / "spool.jsonl").open("a") as spool:
        spool.write('{"t": 1, "kind": "met')  # a write that the crash cut short
    before = spooled_steps(tmp_path)
    assert len(before) >= 50
    tracker = open_tracker(tmp_path)
    tracker.metrics({"loss": 0.0}, 1_000_000)
    tracker.close(PATIENCE_S)
    # All once more: the progress file is lost, but not the run's id in it.
    progress = tmp_path / "tracking" / "shipped.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"offset": 0}))
    open_tracker(tmp_path).close(PATIENCE_S)
    assert steps_of(reader.run(tracker.uri, tracker.run_id)) == [*before, 1_000_000]


def test_the_shipper_of_a_killed_trainer_ships_the_rest_and_ends(
    tmp_path: Path, reader: Reader, killed_trainer: Callable[[bool], int]
) -> None:
    pid = killed_trainer(False)
    wait_until(lambda: not is_running(pid))
    run = reader.run(embedded_uri(tmp_path), (tmp_path / "tracking" / "run_id").read_text().strip())
    assert steps_of(run) == spooled_steps(tmp_path)
    assert run["status"] == "KILLED"


def test_a_server_that_never_answers_costs_nothing_but_the_delay(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # the shipper's; 5 s would do as well
    with socket.create_server(("127.0.0.1", 0)) as server, monkeypatch.context() as cut_off:
        server.listen(64)
        # The trainer's process can neither reach a network nor import mlflow: it needs neither.
        cut_off.setattr(socket.socket, "connect", None)
        cut_off.setitem(sys.modules, "mlflow", None)
        uri = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"
        tracker = open_tracker(tmp_path, uri=uri, drain_s=0.0)
        for step in range(1000):
            tracker.metrics({"loss": float(step)}, step)
        wait_until(lambda: tracker.problem is not None)
        assert tracker.run_id is None and tracker.dropped == 0
        assert "secret" not in tracker.uri + str(tracker.problem)
        tracker.close(timeout_s=0.5)
        assert spooled_steps(tmp_path) == list(range(1000))
        assert tracker._shipper is not None
        tracker._shipper.wait(PATIENCE_S)  # drain_s is over: it does not outlive us for long
    again = open_tracker(tmp_path)  # the replay, into another store
    again.close(PATIENCE_S)
    assert steps_of(reader.run(again.uri, again.run_id)) == list(range(1000))


@pytest.mark.slow
def test_a_server_that_stops_for_a_while_gets_every_row_once(
    tmp_path: Path, reader: Reader
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    store = f"sqlite:///{tmp_path}/server.db"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        + ["--backend-store-uri", store, "--workers", "1"]
        + ["--artifacts-destination", str(tmp_path / "artifacts")],
        start_new_session=True,
        env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
    )
    try:
        tracker = open_tracker(tmp_path / "run", uri=f"http://127.0.0.1:{port}")
        for step in range(300):
            tracker.metrics({"loss": float(step)}, step)
            if step == 100:
                wait_until(lambda: tracker.run_id is not None and tracker.spooled == 0)
                os.killpg(server.pid, signal.SIGSTOP)
        wait_until(lambda: tracker.problem is not None)
        assert tracker.spooled > 0
        os.killpg(server.pid, signal.SIGCONT)
        tracker.close(PATIENCE_S)
        assert tracker.url == f"http://127.0.0.1:{port}/#/experiments/1/runs/{tracker.run_id}"
        run = reader.run(f"http://127.0.0.1:{port}", tracker.run_id)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert steps_of(run) == list(range(300)) and run["status"] == "FINISHED"


# The trainer's side alone: no test below starts a shipper.


@pytest.fixture
def no_shipper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracker, "_keep_shipper", lambda self: None)


def test_a_full_queue_drops_and_counts_and_says_so(
    tmp_path: Path, no_shipper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, release = threading.Event(), threading.Event()

    def hanging_disk(descriptor: int) -> None:
        entered.set()
        release.wait()

    tracker = open_tracker(tmp_path, queue_size=10)
    monkeypatch.setattr(os, "fsync", hanging_disk)
    tracker.metrics({"loss": 0.0}, 0)
    assert entered.wait(PATIENCE_S)
    before = len(tracker._queue)
    for step in range(1, 31):
        tracker.metrics({"loss": 0.0}, step)
    assert tracker.dropped == 20 + before
    release.set()
    wait_until(lambda: not tracker._queue)
    tracker.close()
    assert len(spooled_steps(tmp_path)) == 31 - tracker.dropped
    assert '"tracking.dropped": "' in (tmp_path / "tracking" / "spool.jsonl").read_text()
    tracker.metrics({"loss": 0.0}, 31)  # too late, and still no exception
    assert tracker.dropped == 21 + before


def test_a_disk_that_is_full_for_a_while_loses_no_row(
    tmp_path: Path, no_shipper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, failures = os.fsync, []

    def full(descriptor: int) -> None:
        if len(failures) < 2:
            failures.append(descriptor)
            raise OSError(28, "No space left on device")
        sync(descriptor)

    tracker = open_tracker(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    tracker.metrics({"loss": 0.0}, 5)
    wait_until(lambda: len(failures) == 2)
    tracker.close()
    assert set(spooled_steps(tmp_path)) == {5} and tracker.dropped == 0


def test_a_value_that_is_no_number_costs_its_row_alone(tmp_path: Path, no_shipper: None) -> None:
    tracker = open_tracker(tmp_path)
    tracker.metrics({"loss": "high"}, 0)  # type: ignore[dict-item]
    tracker.metrics(None, 1)  # type: ignore[arg-type]
    tracker.metrics({"loss": 1.0}, 2)
    tracker.close()
    assert spooled_steps(tmp_path) == [2] and tracker.dropped == 2


def test_a_second_tracker_on_a_folder_is_refused_until_the_first_closes(
    tmp_path: Path, no_shipper: None
) -> None:
    first = open_tracker(tmp_path)
    with pytest.raises(ValueError, match="another run_dir"):
        open_tracker(tmp_path)
    first.close()
    open_tracker(tmp_path).close()


def test_a_forked_child_does_not_hold_the_folder(tmp_path: Path, no_shipper: None) -> None:
    tracker = open_tracker(tmp_path)
    stay, leave = os.pipe()
    forked, ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(leave)
        os.write(ready, b".")  # what is registered to run after a fork has run by now
        os.read(stay, 1)
        os._exit(0)
    try:
        os.read(forked, 1)
        tracker.close()
        open_tracker(tmp_path).close()
    finally:
        for end in (leave, stay, forked, ready):
            os.close(end)
        os.waitpid(child, 0)


def test_a_shipper_that_dies_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Sequence[str]] = []
    monkeypatch.setattr(sys, "executable", "/bin/false")
    popen = subprocess.Popen

    def counted(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(command)
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", counted)
    tracker = open_tracker(tmp_path)
    wait_until(lambda: len(started) == 1)
    tracker._restart_at = 0.0
    wait_until(lambda: len(started) == 2)
    tracker.close()


def test_no_tracker_takes_everything_and_keeps_nothing(tmp_path: Path) -> None:
    tracker = NoTracker()
    tracker.metrics({"loss": 1.0}, 0)
    tracker.params({"a": 1})
    tracker.tags({"a": 1})
    tracker.artifact(tmp_path)
    tracker.event("x", 0)
    tracker.close()
    assert (tracker.run_id, tracker.url, tracker.problem) == (None, None, None)
    assert tracker.dropped == tracker.spooled == 0


def test_the_two_trackers_have_the_same_interface() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(Tracker) - public(NoTracker) == {"open", "release", "uri"}


def test_a_description_keeps_each_version_and_names_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, Any] = {"files": [], "tags": {}}

    class Listening(NoTracker):
        def artifact(self, path: Path, folder: str = "") -> None:
            logged["files"].append(path.name)

        def tags(self, values: Any) -> None:
            logged["tags"] |= values

    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    manifest = '{"tokens": 1}'
    run = tmp_path / "run"
    run.mkdir()
    for config in ("steps: 1\n", "steps: 1\n", "steps: 2\n"):
        describe_run(Listening(), run, config, manifest)
    assert (run / "config.yaml").read_text() == "steps: 2\n"
    assert (run / "config.1.yaml").read_text() == "steps: 1\n"
    assert (run / "data_manifest.json").read_text() == manifest
    assert "\ntorch==" in (run / "environment.txt").read_text()
    assert sorted(set(logged["files"])) == sorted(path.name for path in run.iterdir())
    assert logged["tags"]["slurm.job_id"] == "42"
    assert logged["tags"]["slurm.restart_count"] == "1"


def test_the_commit_is_that_of_the_code_and_tells_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    code, other = tmp_path / "code.py", tmp_path / "installed.py"
    code.write_text("1")
    other.write_text("1")
    assert source_commit(code) is None
    git("init")
    git("add", "code.py")
    git("commit", "-m", "first")
    assert source_commit(code) == (git("rev-parse", "HEAD"), False)
    code.write_text("2")
    assert source_commit(code) == (git("rev-parse", "HEAD"), True)
    assert source_commit(other) is None  # inside a working copy, but no part of it


def test_a_sample_of_the_node_uses_mlflow_names(tmp_path: Path) -> None:
    system = SystemMetrics(lambda values: None, tmp_path, every_s=60.0)
    sample = system.sample()
    system.stop()
    assert sample["system/system_memory_usage_megabytes"] > 0
    assert 0 < sample["system/disk_usage_percentage"] <= 100
    assert {"system/cpu_utilization_percentage", "system/network_receive_megabytes"} <= set(sample)


# The shipper alone, over a run that misbehaves.


class FakeRun:
    """Stands in for MlflowRun: refuses a key, or has gone once."""

    refused_key, gone = "", False
    sent: list[int]

    def __init__(self, folder: Path, session: Session) -> None:
        pass

    def attach(self, progress: Progress) -> Progress:
        return Progress(progress.key, 0, "run", "1")

    def send(self, rows: Sequence[dict[str, Any]]) -> None:
        if FakeRun.gone:
            FakeRun.gone = False
            raise RunGoneError("run")
        if any(FakeRun.refused_key in row["values"] for row in rows):
            raise RefusedError("no such key")
        FakeRun.sent += [row["step"] for row in rows]

    def upload(self, path: Path, folder: str) -> None:
        raise RefusedError("no artifact store")


@pytest.fixture
def fake_shipper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shipper:
    monkeypatch.setattr(shipping, "MlflowRun", FakeRun)
    monkeypatch.setattr(FakeRun, "sent", [], raising=False)
    rows = [
        {"t": 1, "kind": "metrics", "step": step, "values": {f"loss{step}": 1.0}}
        for step in range(20)
    ]
    rows.insert(
        3, {"t": 1, "kind": "artifact", "step": None, "values": {"path": "/x", "folder": ""}}
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "spool.jsonl").write_text(text + '{"t": 2, "kind"')
    return Shipper(tmp_path, Session("s", "uri", "e", "r", False, 0, 1.0))


def test_a_refused_row_is_put_aside_and_the_others_arrive(
    tmp_path: Path, fake_shipper: Shipper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRun, "refused_key", "loss7")
    assert not fake_shipper.ship()
    assert FakeRun.sent == [step for step in range(20) if step != 7]
    refused = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert [row["step"] for row in refused] == [7, None]
    assert fake_shipper.ship()  # no more than the start of a line is left


def test_a_run_deleted_at_the_server_is_replaced_and_gets_all(fake_shipper: Shipper) -> None:
    FakeRun.gone = True
    with pytest.raises(RunGoneError):
        fake_shipper.ship()
    fake_shipper.ship()
    assert FakeRun.sent == list(range(20))
