"""Ends a job that hangs, and says where: a thread beside each rank's training.

A rank is stuck when it made no progress for longer than its limit: a multiple of the slowest recent
step, so a step that takes 12 minutes is let be. The job hangs when every rank is stuck or silent (a
stopped process, a lost node); while one is busy (it reads data, it saves) the others wait for it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from train.cluster.failure import HUNG
from train.watch.hang import describe_hang
from train.watch.peers import Peers, Report
from train.watch.pulse import Pulse
from train.watch.stack import describe_thread, last_collectives

MEASURED_STEPS = 2
"""The first step compiles and connects, and says little of the others."""
_SILENT_AFTER = 5
"""Intervals without a report: a live rank's thread tells something in each."""
_WAIT_FOR_REPORT_S = 20.0


class Limits(NamedTuple):
    """How long a rank may be without progress."""

    first_s: float  # until steps were measured, and always outside of steps
    floor_s: float  # never less than this
    factor: float  # times the slowest recent step

    def limit_s(self, pulse: Pulse) -> float:
        """Return the limit where the rank is now."""
        measured = list(pulse.steps_s)
        if len(measured) < MEASURED_STEPS:
            return self.first_s
        limit = max(self.floor_s, self.factor * max(measured))
        return limit if pulse.place().phase == "step" else max(limit, self.first_s)

    def backstop_s(self, pulse: Pulse) -> float:
        """Return a timeout for torch's collectives, which must not fire before the watchdog.

        It ends a rank whose interpreter is held, so that no thread of it runs.
        """
        return 2 * max(self.first_s, self.limit_s(pulse))


@dataclass
class _Heard:
    """A peer's last report, and when this rank first saw it."""

    report: Report
    at: float


class Watchdog:
    """The thread of one rank. Give it the pulse that training writes."""

    def __init__(
        self,
        pulse: Pulse,
        peers: Peers,
        limits: Limits,
        *,
        node: str,
        report: Callable[[str, int], None],
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Watch the thread that makes this.

        report: called with the hang's description and step on one rank, before the processes end.
        """
        self.pulse, self.peers, self.limits, self.node = pulse, peers, limits, node
        self._report, self._end = report, end
        self._watched = threading.get_ident()
        self._interval_s = min(2.0, limits.floor_s / 4, limits.first_s / 4)
        self._stopping = threading.Event()
        self._beats, self._still_s, self._number = -1, 0.0, 0
        self._heard: dict[int, _Heard] = {}
        self._unread_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join(timeout=2 * self._interval_s)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stopping.wait(self._interval_s):
            now = time.monotonic()
            # A process that was suspended with the whole job made no progress, and is not stuck.
            elapsed, last = min(now - last, 2 * self._interval_s), now
            beats = self.pulse.beats
            self._still_s = 0.0 if beats != self._beats else self._still_s + elapsed
            self._beats = beats
            mine = self._describe_self()
            problem = self._tell(mine)
            if not mine.stuck:
                self._heard.clear()
            elif (hung := self._find_hang(mine, now, problem)) is not None:
                self._finish(hung, mine, problem)
                return

    def _describe_self(self) -> Report:
        self._number += 1
        report = Report(
            rank=self.peers.rank,
            node=self.node,
            place=self.pulse.place(),
            number=self._number,
            time=time.time(),
            still_s=self._still_s,
            limit_s=self.limits.limit_s(self.pulse),
        )
        if not report.stuck:
            return report
        try:
            waits, collectives = describe_thread(self._watched), tuple(last_collectives())
        except Exception as error:  # torch's own names may change; a hang ends
            waits, collectives = f"a place that cannot be told ({error!r})", ()
        return replace(report, waits=waits, collectives=collectives)

    def _tell(self, mine: Report) -> str | None:
        """Publish a report; return what is wrong with the store."""
        try:
            self.peers.publish(mine)
        except Exception as error:  # whatever the store's: the watch goes on without it
            return f"{type(error).__name__}: {error}"
        return None

    def _find_hang(self, mine: Report, now: float, problem: str | None) -> list[Report] | None:
        """Return the ranks' reports where none of them will go on, else None.

        A rank's silence shows only with time: the first call of a row begins to listen.
        """
        silent_s = _SILENT_AFTER * self._interval_s
        try:
            reports = self.peers.read()
            self._unread_since = None
        except Exception:  # a store that answers late once says nothing of the ranks
            if self._unread_since is None:
                self._unread_since = now
            if now - self._unread_since < silent_s:
                return None
            reports = {}
        for rank, found in (reports | {mine.rank: mine}).items():
            known = self._heard.get(rank)
            if known is None or known.report.number != found.number:
                self._heard[rank] = _Heard(found, now)
        busy = [
            heard
            for heard in self._heard.values()
            if not heard.report.stuck and now - heard.at < silent_s
        ]
        return None if busy else [self._heard[rank].report for rank in sorted(self._heard)]

    def _finish(self, reports: list[Report], mine: Report, problem: str | None) -> None:
        """Report the hang, or leave that to the first rank that lives, and end the process."""
        try:
            speaker = min(report.rank for report in reports if report.stuck)
            if speaker == mine.rank:
                text = describe_hang(reports, self.peers.world_size, problem)
                self._report(text, mine.place.step)
                self._tell_reported()
                # Ranks whose peer is gone first end with an error of gloo's, not with this code.
                time.sleep(self._interval_s)
            else:
                self._wait_for_report()
        finally:
            sys.stderr.flush()
            self._end(HUNG)

    def _tell_reported(self) -> None:
        try:
            self.peers.tell_reported()
        except RuntimeError:
            pass  # the others wait for a while and then go by themselves

    def _wait_for_report(self) -> None:
        until = time.monotonic() + _WAIT_FOR_REPORT_S
        try:
            while time.monotonic() < until and not self.peers.reported():
                time.sleep(self._interval_s / 4)
        except RuntimeError:
            pass  # the store went with the rank that reported
