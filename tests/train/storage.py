"""A file system that can hang, or go away and come back, as a network's does: bindfs over a folder.

A stopped bindfs is a server that does not answer: whatever touches the file system waits. A killed
one is a server that is lost: every call fails, also on what is open, and what was open stays dead
when the file system is mounted again.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType


def why_not() -> str | None:
    """Return why no such file system can be had here."""
    if shutil.which("bindfs") is None:
        return "bindfs is not installed (Debian's package bindfs)"
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK):
        return "mounting needs root and /dev/fuse"
    return None


class Storage:
    """`path` shows what lies in a folder beside it, as long as the server lives."""

    def __init__(self, folder: Path) -> None:
        self.path, self._behind, self._fresh = (folder / n for n in ("net", "disk", "net2"))
        for each in (self.path, self._behind, self._fresh):
            each.mkdir(parents=True)
        self._servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Storage":
        self._serve(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for mount in (self.path, self.path, self._fresh):
            subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
        for server in self._servers:
            server.kill()
            server.wait()

    def hang(self, seconds: float) -> None:
        """Let every call wait for so long."""
        server = self._servers[-1]
        server.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        server.send_signal(signal.SIGCONT)

    def lose(self, seconds: float) -> None:
        """Let every call fail for so long; files that are open now stay lost."""
        self._servers[-1].kill()
        self._servers[-1].wait()
        time.sleep(seconds)
        self._serve(self._fresh)
        # Over the dead mount, as that cannot be left for a moment without a gap.
        command = ["mount", "--no-mtab", "--no-canonicalize", "--internal-only", "--bind"]
        subprocess.run([*command, self._fresh, self.path], check=True)

    def _serve(self, mount: Path) -> None:
        server = subprocess.Popen(["bindfs", "-f", self._behind, mount])
        self._servers.append(server)
        until = time.monotonic() + 120
        while not os.path.ismount(mount):
            assert server.poll() is None and time.monotonic() < until, "bindfs did not mount"
            time.sleep(0.02)
