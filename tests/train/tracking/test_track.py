"""`longhaul track`: what a server missed reaches it, and a run's own store opens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.train.runs import longhaul
from train.tracking.replay import read_session, replay
from train.tracking.tracker import Tracker

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 300.0
"""Never waited for in a good run: a server takes a minute to start on a loaded machine."""

COUNT = """
import sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
run = client.get_run(sys.argv[2])
steps = [m.step for m in client.get_metric_history(sys.argv[2], "loss")]
print(run.info.status, *sorted(steps))
"""


@pytest.fixture(autouse=True)
def no_outside_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def open_tracker(run: Path, uri: str | None = None) -> Tracker:
    return Tracker.open(run, experiment="e", run_name="r", uri=uri, system_every_s=0.0, drain_s=0.0)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def in_store(uri: str, run_id: str | None) -> list[str]:
    """Return the status and the steps of a run."""
    assert run_id is not None
    command = [sys.executable, "-P", "-c", COUNT, uri, run_id]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def log(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.metrics({"loss": float(step)}, step)


def test_a_run_that_was_not_tracked_is_refused_with_the_reason(tmp_path: Path) -> None:
    for words in (("sync", tmp_path), ("ui", tmp_path)):
        ended = longhaul("track", *words)
        assert ended.returncode == 2 and "tracking.enabled=false" in ended.stderr


def test_sync_sends_what_a_killed_run_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as alone:
        alone.setattr(Tracker, "_keep_shipper", lambda self: None)  # it died with the node
        tracker = open_tracker(tmp_path)
        log(tracker, range(20))
        tracker.close()
    with (tmp_path / "tracking" / "spool.jsonl").open("a") as spool:
        spool.write('{"t": 1, "kind": "met')  # a write that the crash cut short
    assert replay(tmp_path, timeout_s=PATIENCE_S).describe() == f"all is at {tracker.uri}"
    assert in_store(tracker.uri, tracker.run_id) == ["FINISHED", *map(str, range(20))]


def test_sync_says_what_is_left_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracker, "_keep_shipper", lambda self: None)
    tracker = open_tracker(tmp_path, f"http://user:secret@127.0.0.1:{free_port()}")
    log(tracker, range(20))
    tracker.close()
    left = replay(tmp_path, timeout_s=1.0)
    assert left.num_bytes > 0 and left.problem is not None
    assert f"{left.num_bytes:,} bytes are not yet at http://127.0.0.1" in left.describe()
    assert "secret" not in left.describe()


def test_the_ui_of_a_run_that_logs_to_a_server_is_that_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracker, "_keep_shipper", lambda self: None)
    open_tracker(tmp_path, "http://user:secret@tracking.example:5000").close()
    ended = longhaul("track", "ui", tmp_path)
    assert ended.stdout == f"{tmp_path} logs to http://tracking.example:5000\n"


def test_a_store_that_is_not_there_yet_is_not_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracker, "_keep_shipper", lambda self: None)
    open_tracker(tmp_path).close()
    ended = longhaul("track", "ui", tmp_path)
    assert ended.returncode == 1 and "longhaul track sync" in ended.stdout
    assert read_session(tmp_path).embedded


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        + ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1"]
        + ["--artifacts-destination", str(folder / "artifacts")],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"))
        yield process
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_server_down_at_the_start_hanging_in_the_middle_and_gone_at_the_end_misses_nothing(
    tmp_path: Path,
) -> None:
    port, run = free_port(), tmp_path / "run"
    uri = f"http://127.0.0.1:{port}"
    tracker = open_tracker(run, uri)
    log(tracker, range(100))
    wait_until(lambda: tracker.problem is not None)  # nobody listens
    with server(tmp_path, port) as process:
        wait_until(lambda: tracker.run_id is not None and tracker.spooled == 0)
        os.killpg(process.pid, signal.SIGSTOP)  # it accepts, and never answers
        log(tracker, range(100, 200))
        wait_until(lambda: tracker.problem is not None)
    log(tracker, range(200, 300))
    tracker.close(timeout_s=0.5)  # gone
    assert tracker.dropped == 0 and tracker.spooled > 0
    with server(tmp_path, port):
        ended = longhaul("track", "sync", run)
        assert ended.returncode == 0, ended.stdout
        assert in_store(uri, tracker.run_id) == ["FINISHED", *map(str, range(300))]


@pytest.mark.slow
def test_the_ui_opens_the_embedded_store(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    log(tracker, range(3))
    tracker.close(PATIENCE_S)
    port = free_port()
    command = [sys.executable, "-c", "from train.cli import main; main()", "track", "ui"]
    process = subprocess.Popen(
        [*command, str(tmp_path), "--port", str(port)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def answer() -> str | None:
        asked = f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/get?run_id={tracker.run_id}"
        try:
            with urllib.request.urlopen(asked, timeout=5) as reply:
                values = json.load(reply)
        except OSError:
            return None
        name: str = values["run"]["info"]["run_name"]
        return name

    try:
        wait_until(lambda: answer() is not None)
        assert answer() == "r"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
