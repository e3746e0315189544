"""A request to stop, taken at any moment and agreed on by all ranks at the next boundary."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM: SLURM and torchrun; SIGUSR1: SLURM's --signal before the time limit; SIGINT: Ctrl-C."""

_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


class StopAgreed(Exception):
    """All ranks have agreed to stop: what was being done is left, on all of them at once."""


def follow_launcher() -> None:
    """Let this rank be asked to stop when the torchrun that started it is killed.

    Nobody else would: it would train on, unseen, in a folder where the same command is given again.
    (Linux tells a process of its parent's end; elsewhere nothing changes.)
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    import ctypes

    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM)) == 0 and os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # it was gone before


class StopRequest:
    """Remembers a stop signal until the ranks ask; a second SIGINT ends the process at once.

    Made before torch is imported: a signal in those seconds must not be lost either. SIGUSR1 is
    blocked and waits in the kernel: whatever this process starts inherits that, and SLURM signals
    every process of a step (a compiler among them, which would die of it).
    """

    def __init__(self) -> None:
        self._received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    @property
    def received(self) -> str | None:
        """The name of the signal that this process got."""
        if self._received is None and signal.SIGUSR1 in signal.sigpending():
            return "SIGUSR1"
        return self._received

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name

    def asked(self) -> bool:
        """Return whether this process was asked to stop; the others may not have been."""
        return self.received is not None

    def agreed(self, device: torch.device) -> bool:
        """Return, the same on every rank, whether any rank has been asked to stop."""
        import torch
        import torch.distributed as dist

        flag = torch.tensor(self.asked(), dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def check(self, device: torch.device) -> None:
        """Raise StopAgreed, on every rank, where any has been asked to stop."""
        if self.agreed(device):
            raise StopAgreed

    def until_agreed(self, steps: Iterator[T], count: int, device: torch.device) -> Iterator[T]:
        """Yield `count` steps, or fewer: the ranks agree before each, with its data in hand.

        Where `steps` ends early, this process was asked to stop while it waited for data: the
        others wait in the agreement, and not in the step, where nobody could call them back.
        """
        for _ in range(count):
            step = next(steps, None)
            if self.agreed(device):
                return
            assert step is not None
            yield step
