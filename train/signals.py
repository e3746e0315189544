"""A request to stop, taken at any moment and agreed on by all ranks at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM: SLURM and torchrun; SIGUSR1: SLURM's --signal before the time limit; SIGINT: Ctrl-C."""


class StopRequest:
    """Remembers a stop signal until the ranks ask; a second SIGINT ends the process at once.

    Made before torch is imported: a signal in those seconds must not be lost either.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self, device: torch.device) -> bool:
        """Return, the same on every rank, whether any rank has been asked to stop."""
        import torch
        import torch.distributed as dist

        flag = torch.tensor(self.received is not None, dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
