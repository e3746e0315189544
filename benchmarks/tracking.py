"""What tracking costs a step, and the exit, where the MLflow server is well, away, slow or hangs.

    python benchmarks/tracking.py

For each server a run of its own: steps of 20 ms, each with 20 metrics. Shown are the time that a
step spent in the tracker (longest, 99th percentile, median), the tracker's start, and its end.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from train.tracking.tracker import Tracker

STEPS, STEP_S, METRICS = 500, 0.02, 20
SLOW_S = 2.0
MIDDLE = STEPS // 2
MODES = {"refuse": "refuses", "slow": f"refuses after {SLOW_S:.0f} s", "hang": "hangs"}


class Cost(NamedTuple):
    """Of one run."""

    opening_s: float
    steps_ms: list[float]
    closing_s: float
    kept: int  # bytes that wait for the server's return
    dropped: int


class Server:
    """A port that takes connections, and answers none, each late, or with an error at once."""

    def __init__(self) -> None:
        self.mode = "refuse"
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._held: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        if self.mode == "hang":
            self._held.append(connection)
            return
        if self.mode == "slow":
            time.sleep(SLOW_S)
        with contextlib.suppress(OSError), connection:
            connection.recv(65536)
            connection.sendall(
                b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )

    def close(self) -> None:
        """Let nobody connect any more."""
        self._socket.close()
        for connection in self._held:
            connection.close()


@contextlib.contextmanager
def serving(mode: str) -> Iterator[Server]:
    """Run a server for the block."""
    server = Server()
    server.mode = mode
    try:
        yield server
    finally:
        server.close()


def run(uri: str | None, server: Server | None = None, later: str | None = None) -> Cost:
    """Track one run; later: what the server does from the middle on."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        tracker = Tracker.open(Path(folder), experiment="bench", run_name="bench", uri=uri)
        opening = time.perf_counter() - began
        values = {f"train/metric_{i}": float(i) for i in range(METRICS)}
        spent = []
        for step in range(STEPS):
            if server is not None and later is not None and step == MIDDLE:
                server.mode = later
            time.sleep(STEP_S)
            began = time.perf_counter()
            tracker.metrics(values, step)
            spent.append(1e3 * (time.perf_counter() - began))
        began = time.perf_counter()
        tracker.close()
        closing = time.perf_counter() - began
        cost = Cost(opening, spent, closing, tracker.spooled, tracker.dropped)
        tracker.release()
        shipper = tracker._shipper
        if shipper is not None and shipper.poll() is None:
            shipper.kill()  # it would go on for drain_s
            shipper.wait()
    return cost


def main() -> None:
    """Print a table."""
    print("| server | start, s | step: longest, ms | 99 % | median | end, s | kept, bytes | lost |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[tuple[str, Cost]] = [("none: a store in the run folder", run(None))]
    with serving("refuse") as server:
        down = server.uri
    rows.append(("down", run(down)))
    for mode, name in MODES.items():
        with serving(mode) as server:
            rows.append((f"{name} from the start", run(server.uri)))
    for mode in ("slow", "hang"):
        with serving("refuse") as server:
            rows.append((f"{MODES[mode]} from the middle", run(server.uri, server, mode)))
    for name, cost in rows:
        steps = statistics.quantiles(cost.steps_ms, n=100)
        print(
            f"| {name} | {cost.opening_s:.2f} | {max(cost.steps_ms):.2f} | {steps[-1]:.2f}"
            f" | {steps[49]:.3f} | {cost.closing_s:.1f} | {cost.kept:,} | {cost.dropped} |"
        )


if __name__ == "__main__":
    main()
