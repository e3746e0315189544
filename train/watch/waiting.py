"""How long this rank waits for others, and what is left of a step as its own work.

Every collective and every message is begun by a method of `ProcessGroup` and ends in `Work.wait`,
whatever library asked for it. With gloo the host waits there, until the data has come. With NCCL it
only tells its GPU to wait, so the time that the GPU's stream stands still is taken, between two
events around each call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

_BEGIN = (
    "all_gather_single", "all_gather_single_coalesced", "all_to_all_single", "allgather",
    "allgather_coalesced", "allreduce", "allreduce_coalesced", "alltoall", "alltoall_base",
    "barrier", "broadcast", "gather", "recv", "reduce", "reduce_scatter", "reduce_scatter_single",
    "reduce_scatter_single_coalesced", "scatter", "send", "_allgather_base", "_end_coalescing",
    "_reduce_scatter_base",
)  # fmt: skip
"""Methods of ProcessGroup after which a stream may stand still: NCCL runs what nobody asked to be
asynchronous in the caller's own stream."""


class Clock(Protocol):
    """Tells how long the device that computes stood still between two marks."""

    begins: bool  # it may stand still where communication begins, not only where it is waited for

    def mark(self) -> Any:
        """Return the present; None where nothing is to be counted."""
        ...

    def between(self, marks: list[tuple[Any, Any]]) -> float:
        """Return the seconds between the two marks of each pair, summed."""
        ...


class HostClock:
    """Of ranks that compute on the host, which waits itself."""

    begins = False

    def mark(self) -> float:
        """Return the present."""
        return time.perf_counter()

    def between(self, marks: list[tuple[float, float]]) -> float:
        """Return the seconds between the two marks of each pair, summed."""
        return sum(end - begin for begin, end in marks)


class StreamClock:
    """Of ranks that compute in a GPU's stream: the one in which this is made."""

    begins = True

    def __init__(self) -> None:
        self._stream = torch.cuda.current_stream()

    def mark(self) -> torch.cuda.Event | None:
        """Return an event in the stream; None in another one, whose waits hold up no computing."""
        if torch.cuda.current_stream() != self._stream:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def between(self, marks: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
        """Return the seconds between the events of each pair, summed, once the last has passed."""
        if marks:
            marks[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in marks)) / 1e3


def choose_clock() -> Clock:
    """Return the clock of this rank's device."""
    return StreamClock() if dist.get_backend() == "nccl" else HostClock()


class Waiting:
    """Seconds that one thread, or its stream, stood still in communication since this was made."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock: Clock = clock or HostClock()
        self._marks: list[tuple[Any, Any]] = []
        self._before = 0.0
        self._thread = threading.get_ident()

    @property
    def seconds(self) -> float:
        """The sum so far; with a stream, all that was begun has then passed."""
        marks, self._marks = self._marks, []
        self._before += self._clock.between(marks)
        return self._before

    @contextmanager
    def counting(self) -> Iterator[Waiting]:
        """Count until the end of the block."""
        with ExitStack() as stack:
            stack.callback(self._count(dist.Work, "wait"))
            for name in _BEGIN if self._clock.begins else ():
                if name in vars(dist.ProcessGroup):  # not every torch has all of them
                    stack.callback(self._count(dist.ProcessGroup, name))
            yield self

    def _count(self, owner: Any, name: str) -> Callable[[], None]:
        """Put a mark before and behind a method; return what takes them away again."""
        original, as_defined = getattr(owner, name), vars(owner)[name]

        def counted(this: Any, *args: Any, **more: Any) -> Any:
            if threading.get_ident() != self._thread:  # a save's own messages
                return original(this, *args, **more)
            began = self._clock.mark()
            try:
                return original(this, *args, **more)
            finally:
                ended = self._clock.mark()
                if began is not None and ended is not None:
                    self._marks.append((began, ended))

        setattr(owner, name, counted)
        # What getattr returned is bound to no instance; as an attribute it would stay so.
        return lambda: setattr(owner, name, as_defined)
