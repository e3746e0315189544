"""The drill's result as a table, written into a page between two marks."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.drill.drill import EVERY, RELATIVE, STEPS, Drill, Layout, Trial
from tests.train.faults import FAULTS

BEGIN, END = "<!-- drill: written by make drill -->", "<!-- end of drill -->"


def table(drill: Drill) -> list[str]:
    """Return the rows: what happened, how often, how often it was found, what it cost."""
    lines = [
        "| fault | trials | found | loaded | samples lost or twice | steps redone: mean, most |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    plain = [trial for trial in drill.trials if trial.fault is None]
    for victims in ("one rank", "all ranks"):
        lines.append(_row(f"kill -9 of {victims}", [t for t in plain if t.victims == victims]))
    for fault in FAULTS:
        hit = [t for t in drill.trials if t.fault is not None and t.fault.name == fault.name]
        if hit:
            lines.append(_row(f"kill -9, then {fault.said}", hit))
    return [*lines, _row("**all**", drill.trials)]


def _row(what: str, trials: Sequence[Trial]) -> str:
    redone = [trial.redone for trial in trials] or [0]
    counts = [
        len(trials),
        sum(trial.found for trial in trials),
        sum(trial.loaded for trial in trials),
        sum(trial.samples for trial in trials),
    ]
    cost = f"{sum(redone) / len(redone):.1f}, {max(redone)}"
    return f"| {what} | {' | '.join(map(str, counts))} | {cost} |"


def report(drill: Drill, *, seed: int, layouts: Sequence[Layout]) -> str:
    """Return the table with what it was measured on."""
    trials = drill.trials
    moments = {name: sum(t.moment == name for t in trials) for name in ("start", "step", "save")}
    lone = [trial for trial in trials if trial.peers_ended is not None]
    lines = [
        f"Seed {seed}: {len(trials)} kills in {drill.rounds} runs of {STEPS} steps, a checkpoint"
        f" every {EVERY}, written beside training; {drill.seconds:.0f} s on"
        f" {platform.machine()} CPU ranks, torch {torch.__version__.partition('+')[0]}.",
        "",
        *table(drill),
        "",
        f"- Moments: {moments['start']} kills while starting, {moments['step']} in a step,"
        f" {moments['save']} aimed at a save; {sum(t.unfinished for t in trials)} left a save"
        " unfinished.",
        "- Found: the fault was named, and the start went on from the newest good checkpoint.",
        f"- {drill.ledgers} of {drill.rounds} ledgers (`longhaul data verify`) hold every sample"
        " exactly once, the same as the undisturbed run's.",
        f"- {drill.same_bits} runs kept their layout, and their losses, gradient norms, weights,"
        " moments, memory and random state at the end equal those of the undisturbed run bit for"
        " bit.",
        f"- {drill.rounds - drill.same_bits} runs changed their layout at"
        f" {sum(t.moved for t in trials)} of their starts (among"
        f" {'; '.join(layout.name for layout in layouts)}): largest relative difference of a loss"
        f" from the undisturbed run {drill.worst:.1e}, allowed {RELATIVE:.0e}.",
        f"- {sum(trial.refused for trial in trials)} times a rank's disk refused a write for a"
        " moment: told, tried again, no run ended by it.",
        f"- {len(drill.failures)} failures.",
        f"- Of {len(lone)} attempts that lost one rank after their start,"
        f" {sum(bool(trial.peers_ended) for trial in lone)} ended by themselves within 10 s.",
    ]
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Put the text between the page's marks. Raises ValueError where it has none."""
    before, found, rest = page.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{page} has no place for the drill: {BEGIN} ... {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
