"""A web server of the test's own, on the loopback, that answers as badly as it is told to."""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves a folder. `troubles[name]` holds what goes wrong with the next requests for a file."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.troubles: dict[str, deque[str]] = {}
        self.requests: list[tuple[str, str | None]] = []  # (name, Range)
        self.ranges = True  # whether a part can be asked for
        self.pause_s = 0.0  # before each answer
        self.go_on = threading.Event()  # ends what stalls

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/shards/train"

    def fail(self, name: str, *kinds: str) -> None:
        self.troubles.setdefault(name, deque()).extend(kinds)

    def counts(self) -> Counter[str]:
        return Counter(name for name, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        asked = self.headers.get("Range")
        self.server.requests.append((name, asked))
        time.sleep(self.server.pause_s)
        waiting = self.server.troubles.get(name)
        trouble = waiting.popleft() if waiting else ""
        path = self.server.folder / name
        if trouble.isdigit() or not path.is_file():
            self.send_response(int(trouble or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        if trouble == "wrong":
            content = bytes(reversed(content))
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        part = content[first:]
        if trouble in ("drop", "stall"):
            part = part[: len(part) // 2]
        try:
            self.wfile.write(part)
            self.wfile.flush()
        except ConnectionError:
            pass  # who asked was killed, or had enough
        if trouble == "stall":
            self.server.go_on.wait(30)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder's files at `server.url`, until the end of the block."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
