"""What watches one attempt at a run on this rank, from its first message to its last."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from parallel.mesh import set_timeout
from train.agree import of_all
from train.checkpoints.names import list_checkpoints
from train.planning.plan import Plan
from train.settings.config import Config
from train.tracking.describe import source_commit
from train.tracking.timeline import Timeline
from train.watch.last_words import first_line, is_echo, last_words
from train.watch.peers import Peers
from train.watch.pulse import Pulse
from train.watch.waiting import Waiting, choose_clock
from train.watch.watchdog import Limits, Watchdog


def node_name() -> str:
    """Return this node's name: SLURM's, where it gave it one, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def limits_of(config: Config, expected_s: float = 0.0) -> Limits:
    """Return how long a rank may be without progress; expected_s: what a step may well take."""
    parallel = config.parallel
    first_s = max(parallel.timeout_s, parallel.hang_factor * expected_s)
    return Limits(first_s, parallel.hang_floor_s, parallel.hang_factor)


class Watch:
    """This rank's pulse and watchdog, the timeline, and where the other ranks are."""

    def __init__(self, config: Config, planned: Plan) -> None:
        """All ranks make theirs together, once they have met."""
        self.planned = planned
        self.rank, self.node = dist.get_rank(), node_name()
        self.nodes = of_all(self.node)
        self.timeline = Timeline(config.run_dir, writes=self.rank == 0)
        self.pulse, self.waiting = Pulse(), Waiting(choose_clock())
        self.limits = limits_of(config, planned.time.total)
        self.backstop_s = self.limits.backstop_s(self.pulse)
        set_timeout(timedelta(seconds=self.backstop_s))
        self._peers = Peers(self.rank, dist.get_world_size())
        self._noted = False

    @contextmanager
    def running(self) -> Iterator[Watch]:
        """Watch until the end of the block."""
        watchdog = Watchdog(
            self.pulse, self._peers, self.limits, node=self.node, report=self.report_hang
        )
        try:
            with self.waiting.counting():
                yield self
        finally:
            watchdog.stop()

    def note_start(self, step: int) -> None:
        """Begin the attempt on the timeline, and tag it in the one MLflow run of all attempts."""
        number, nodes = self.timeline.attempt + 1, list(dict.fromkeys(self.nodes))
        facts: dict[str, object] = {"attempt": number, "nodes": nodes, "commit": None}
        facts["job"] = os.environ.get("SLURM_JOB_ID")
        if (source := source_commit(Path(__file__))) is not None:
            facts["commit"] = source[0]
        self.timeline.add("started", step, f"started at step {step}", facts)
        if step:
            self.timeline.add("resumed", step, f"resumed at step {step}")
        shown = facts | {"nodes": " ".join(nodes), "from_step": step}
        tags = {f"attempt.{number}.{name}": x for name, x in shown.items() if x is not None}
        self.timeline.tracker.tags({"attempt": number, **tags})

    def note_failure(self, error: Exception, step: int) -> None:
        """Write down, once, what ended this rank, unless that only follows from another's end."""
        if not self._noted and not is_echo(error):
            self._noted = True
            self.timeline.add("failed", step, first_line(error), must=True)

    def last_words(self, config: Config, error: Exception, command: str) -> str:
        """Return the last lines of this rank, which an error ended; command: goes on."""
        checkpoints: list[Path] = []
        with contextlib.suppress(OSError):  # it may be what the error is about
            checkpoints = list_checkpoints(config.run_dir / "checkpoints")
        return last_words(
            error,
            run=config.name,
            rank=self.rank,
            node=self.node,
            checkpoint=str(checkpoints[-1]) if checkpoints else None,
            command=command,
            planned=self.planned.memory.largest(),
        )

    def stretch(self) -> None:
        """Keep torch's own timeouts behind the watchdog's limit as steps turn out slow."""
        needed = self.limits.backstop_s(self.pulse)
        if needed > self.backstop_s:
            self.backstop_s = 2 * needed  # so that this is rare
            set_timeout(timedelta(seconds=self.backstop_s))

    def report_hang(self, text: str, step: int) -> None:
        """Say it, write it down, and give the tracker a moment (the watchdog's thread)."""
        for line in text.splitlines():
            print(f"[watchdog of rank {self.rank}] {line}", file=sys.stderr, flush=True)
        self.timeline.add("hang", step, text, must=True)
        self.timeline.tracker.close(timeout_s=5.0, status="FAILED")
