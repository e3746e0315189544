"""The time between SLURM's warning and the end: asked with --signal, checked against what it takes.

A warned run ends its step, lets a save that is under way end, saves, and leaves. How long steps and
saves take is measured while training and kept in the run folder, so that the next start, and the
next submission, can say that the warning comes too late before it does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from data.durable import write_atomically

TIMING = "timing.json"
ASKED = "LEAD_S"
"""Environment of a job: seconds that its --signal asks for."""
LEAVING_S = 30.0
"""After the save: tracking may take 10 s, processes and SLURM's step to end the rest."""
DEFAULT_S = 300
"""Where nothing has been measured yet."""
_LATE_S = 60
"""SLURM's clock: a signal may come up to a minute early, so leads are whole minutes."""


class Timing(NamedTuple):
    """The longest step and save of a run, in seconds; the first step's compilation counts."""

    step_s: float
    save_s: float

    @property
    def needed_s(self) -> float:
        """From the warning to the end: a step, a save under way, a save, and leaving."""
        return self.step_s + 2 * self.save_s + LEAVING_S

    def longest(self, other: Timing | None) -> Timing:
        """Return the longer of each."""
        if other is None:
            return self
        return Timing(max(self.step_s, other.step_s), max(self.save_s, other.save_s))


class LeadTime:
    """Measures one attempt, on rank 0."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.step_s, self.told = run_dir, 0.0, False
        asked = os.environ.get(ASKED)
        self.asked_s = float(asked) if asked else None

    def step(self, seconds: float) -> None:
        """Count a step."""
        self.step_s = max(self.step_s, seconds)

    def saved(self, seconds: float) -> str | None:
        """Write down what a save took; return, once, why the lead asked for is too short."""
        timing = Timing(self.step_s, seconds).longest(read_timing(self.run_dir))
        with contextlib.suppress(OSError):  # the next save writes it
            write_atomically(self.run_dir / TIMING, json.dumps(timing._asdict()))
        if self.asked_s is None or self.told:
            return None
        advice = advise(self.run_dir, self.asked_s)
        self.told = advice is not None
        return advice


def read_timing(run_dir: Path) -> Timing | None:
    """Return what was measured, None where nothing was."""
    try:
        return Timing(**json.loads((run_dir / TIMING).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def lead_for(run_dir: Path) -> int:
    """Return the seconds to ask for: half as much again as needed, in whole minutes."""
    timing = read_timing(run_dir)
    return DEFAULT_S if timing is None else math.ceil(1.5 * timing.needed_s / _LATE_S) * _LATE_S


def advise(run_dir: Path, asked_s: float) -> str | None:
    """Return why a lead is too short, and what to ask for; None where it is long enough."""
    timing = read_timing(run_dir)
    if timing is None or timing.needed_s <= asked_s:
        return None
    return (
        f"the warning of {asked_s:.0f} s before the time limit is too short: a step took up to"
        f" {timing.step_s:.1f} s and a save {timing.save_s:.1f} s, so stopping may need"
        f" {timing.needed_s:.0f} s (a step, two saves, {LEAVING_S:.0f} s to leave) and steps since"
        f" the last checkpoint would be lost; submit with --signal=B:USR1@{lead_for(run_dir)}"
    )
