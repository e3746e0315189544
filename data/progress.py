"""A bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_LINE_EVERY_S = 30.0


class Bar:
    """Counts bytes of input. A batch job's log gets plain lines, not a redrawn bar."""

    def __init__(self, total_bytes: int, *, shown: bool) -> None:
        tty = sys.stderr.isatty()
        self._total = total_bytes
        self._done = 0
        self._lines = shown and not tty
        self._shown = shown
        self._begin = self._last = time.monotonic()
        self._tqdm = tqdm(
            total=total_bytes,
            desc="prepare",
            unit="B",
            unit_scale=True,
            mininterval=1.0,
            disable=not (shown and tty),
        )

    def update(self, count: int) -> None:
        """Add `count` bytes."""
        self._done += count
        self._tqdm.update(count)
        now = time.monotonic()
        if self._lines and now - self._last >= _LINE_EVERY_S:
            self._last = now
            rate = self._done / (now - self._begin)
            share = 100 * self._done / max(1, self._total)
            self.say(
                f"prepare {share:.0f}% | {self._done / 1e6:.0f} of {self._total / 1e6:.0f} MB"
                f" | {rate / 1e6:.1f} MB/s"
            )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._shown:
            tqdm.write(line, file=sys.stderr)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tqdm.close()
