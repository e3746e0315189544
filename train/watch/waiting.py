"""How long this rank waits for others, and what is left of a step as its own work.

Every collective and every message ends in `Work.wait`, whatever library began it. With gloo it
returns when the data is there, so the time in it is time in which this rank could not go on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class Waiting:
    """Seconds that one thread spent in `Work.wait` since this was made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._thread = threading.get_ident()

    @contextmanager
    def counting(self) -> Iterator[Waiting]:
        """Count until the end of the block."""
        work: Any = dist.Work
        original = work.wait

        def wait(this: Any, *args: Any, **more: Any) -> Any:
            if threading.get_ident() != self._thread:  # a save's own messages
                return original(this, *args, **more)
            began = time.perf_counter()
            try:
                return original(this, *args, **more)
            finally:
                self.seconds += time.perf_counter() - began

        work.wait = wait
        try:
            yield self
        finally:
            work.wait = original
