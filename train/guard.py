"""Which steps are bad: a loss or gradient that is not finite, or a loss far above the recent ones.

The limit of a spike is known before the step's last backward, so a spike can be kept from the
weights in the way that ZeRO keeps a gradient that is not finite: as nan.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist

from train.settings.guard import GuardSection

Trouble: TypeAlias = Literal["gradient", "loss", "spike"]
_TROUBLES: tuple[Trouble, ...] = ("gradient", "spike", "loss")
_DEVIATIONS = 1.4826
"""Standard deviations in a median distance from the median, of a normal distribution."""


class Guard:
    """The recent losses, and what they say of the next one."""

    def __init__(self, section: GuardSection | None = None, losses: Iterable[float] = ()) -> None:
        """losses: of the steps done before that had an update, oldest first."""
        self.section = section or GuardSection()
        self.losses: deque[float] = deque(losses, maxlen=self.section.spike_window)

    def limit(self) -> float:
        """Return the loss above which the next step is a spike; inf where none would be."""
        section = self.section
        if section.spike == "ignore" or 2 * len(self.losses) < section.spike_window:
            return math.inf
        middle = median(self.losses)
        spread = _DEVIATIONS * median(abs(loss - middle) for loss in self.losses)
        return middle + max(section.spike_sigmas * spread, (section.spike_factor - 1) * abs(middle))

    def cut(self) -> float:
        """Return the loss above which the next step must not change the weights."""
        return self.limit() if self.section.spike in ("skip", "rollback") else math.inf

    def judge(self, loss: float, *, skipped: bool, device: torch.device) -> Trouble | None:
        """Return what is wrong with a step, the same on all ranks; None: nothing.

        skipped: it had no update, as all ranks know. All ranks call this together.
        """
        if not skipped:
            spike = loss > self.limit()
            self.losses.append(loss)
            return "spike" if spike else None
        # Ranks of other TP groups may see a loss whose last bits differ, beside the limit.
        mine: Trouble = "gradient"
        if not math.isfinite(loss):
            mine = "loss"
        elif loss > self.cut():
            mine = "spike"
        found = torch.tensor(_TROUBLES.index(mine), device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return _TROUBLES[int(found.item())]
