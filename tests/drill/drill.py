"""The fault drill: kill a run at random moments, damage its newest checkpoint, and go on.

Each round is one short run, killed and resumed until its last step is done, and then compared with
one that nobody disturbed. Moments, victims, layouts and faults follow from the seed; what a kill
meets follows from the machine too.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.train.attempts import (
    Forked,
    assert_same_bits,
    finish,
    forked,
    losses,
    pretrain,
    read_rows,
)
from tests.train.faults import Fault, applicable
from tests.train.tiny import Shards, tiny
from train.config import Config, validate
from train.manifest import list_checkpoints, step_of

STEPS = 40
EVERY = 2
RELATIVE = 1e-6
"""Of losses where the layout changed: its sums run in another order."""
START_S = 1.5
"""About what the start of an attempt takes, for kills that come within it."""
PEERS_S = 10.0
"""What the ranks that lose a peer get to end by themselves, before they are killed too."""


class Layout(NamedTuple):
    """How many ranks, and what of the configuration shares the work among them."""

    name: str
    ranks: int
    changes: dict[str, object]


HOME = Layout("DP 2, ZeRO 1", 2, {})
LAYOUTS: tuple[Layout, ...] = (HOME,)


@dataclass
class Trial:
    """One kill, and what the starts after it made of it."""

    moment: str  # start, step, save
    victims: str  # one rank, all ranks
    unfinished: bool = False  # whether it left a save unfinished
    fault: Fault | None = None  # done to the newest checkpoint before the next start
    named: str = ""  # what must be said of the fault
    lost: int = 0  # steps between the newest checkpoint and the one that was taken
    redone: int = 0  # steps in the log that were done again
    moved: bool = False  # whether the next start had another layout
    peers_ended: bool | None = None  # whether ranks that lost a peer ended by themselves


@dataclass
class Drill:
    """All trials, and how their rounds ended."""

    trials: list[Trial] = field(default_factory=list)
    rounds: int = 0
    same_bits: int = 0  # rounds in one layout that ended bit for bit as the undisturbed run
    worst: float = 0.0  # largest relative difference of a loss in the other rounds
    seconds: float = 0.0


def run_drill(
    folder: Path,
    shards: Shards,
    *,
    kills: int,
    seed: int,
    layouts: Sequence[Layout] = LAYOUTS,
    say: Callable[[str], None] = lambda text: None,
) -> Drill:
    """Return what so many kills led to; rounds keep their layout and change it in turn.

    Raises AssertionError where a checkpoint is incomplete, a fault is not found, a sample is lost
    or read twice, or a loss is not that of the undisturbed run.
    """
    chance, drill, began = random.Random(seed), Drill(), time.monotonic()
    whole = configuration(folder / "whole", shards, HOME)
    finish(HOME.ranks, whole)
    say(f"undisturbed: {STEPS} steps in {time.monotonic() - began:.1f} s")
    while len(drill.trials) < kills:
        drill.rounds += 1
        stays = drill.rounds % 2 == 1 or len(layouts) == 1
        disturbed = Round(folder / f"round-{drill.rounds}", shards, chance)
        disturbed.run((HOME,) if stays else layouts, kills - len(drill.trials), say)
        drill.trials += disturbed.trials
        if stays:
            assert_same_bits(disturbed.run_dir, whole.run_dir, STEPS)
            drill.same_bits += 1
        else:
            drill.worst = max(drill.worst, difference(disturbed.run_dir, whole.run_dir))
            assert drill.worst <= RELATIVE, drill.worst
        say(f"round {drill.rounds}: every step once, {'same bits' if stays else drill.worst}")
        shutil.rmtree(disturbed.run_dir)
    drill.seconds = time.monotonic() - began
    return drill


def configuration(run_dir: Path, shards: Shards, layout: Layout) -> Config:
    """Return that of the drill's run in a layout."""
    settings = {"train__steps": STEPS, "train__lr": 0.003, "checkpoint__every": EVERY}
    return validate(tiny(run_dir, shards, **settings, **layout.changes))


def difference(actual: Path, expected: Path) -> float:
    """Return the largest relative difference of the losses of two runs of the same steps."""
    one, other = losses(actual), losses(expected)
    assert [row[0] for row in one] == [row[0] for row in other] == list(range(1, STEPS + 1))
    return max(abs(a[1] - b[1]) / abs(b[1]) for a, b in zip(one, other, strict=True))


class Round:
    """One run, from its first start to its last step."""

    def __init__(self, run_dir: Path, shards: Shards, chance: random.Random) -> None:
        self.run_dir, self.shards, self.chance = run_dir, shards, chance
        self.checkpoints = run_dir / "checkpoints"
        self.trials: list[Trial] = []
        self.open: list[Trial] = []  # after which no start has come to its first step
        # When the first of them came:
        self.heard = ""  # what was said since
        self.rows, self.newest, self.expected = 0, 0, 0  # in the log; saved; to resume from

    def run(self, layouts: Sequence[Layout], kills: int, say: Callable[[str], None]) -> None:
        """Start the run, and again after each kill, until it is done."""
        layout = HOME
        while True:
            trial, text, began = self._attempt(layout, kill=len(self.trials) < kills)
            self.heard += text
            resumed = re.findall(r"resumed at step (\d+)", text)
            if resumed or any(row["time"] > began for row in read_rows(self.run_dir)):
                self._judge(int(resumed[0]) if resumed else 0)
            if trial is None:
                return
            self._prepare(trial)
            choice = self.chance.choice(layouts)
            trial.moved, layout = choice != layout, choice
            self.trials.append(trial)
            self.open.append(trial)
            say(f"{len(self.trials)}: {describe(trial)}")

    def _attempt(self, layout: Layout, *, kill: bool) -> tuple[Trial | None, str, float]:
        """Start the ranks; return the trial if they were killed, what they said, and when it began.

        Raises AssertionError where they fail by themselves.
        """
        config, began = configuration(self.run_dir, self.shards, layout), time.time()
        with forked(layout.ranks, self.run_dir, pretrain, config) as attempt:
            trial = self._kill(attempt, began) if kill else None
            if trial is None:
                assert attempt.wait() == [0] * layout.ranks, attempt.text()
            return trial, attempt.text(), began

    def _kill(self, attempt: Forked, began: float) -> Trial | None:
        """Kill one rank or all at a random moment; None where the run was done before it."""
        moment = self.chance.choices(("start", "step", "save"), (2, 5, 3))[0]
        after, steps = self.chance.random(), self.chance.randint(1, 8)
        alone = self.chance.random() < 0.5
        victims = self.chance.sample(attempt.ranks, 1 if alone else len(attempt.ranks))

        def came() -> bool:
            if moment == "start":
                return time.time() > began + after * START_S
            rows = sum(row["time"] > began for row in read_rows(self.run_dir))
            saving = moment == "step" or any(self.checkpoints.glob("step-*.tmp"))
            return rows >= steps and saving

        while not came():
            if not attempt.running():
                return None
            time.sleep(0.0005)
        # a step takes about a tenth of a second, a save a hundredth
        time.sleep(after * {"start": 0.0, "step": 0.1, "save": 0.01}[moment])
        for pid in victims:
            if pid not in attempt.codes:
                os.kill(pid, signal.SIGKILL)
        trial = Trial(moment, "one rank" if alone else "all ranks")
        if alone and moment != "start":
            until = time.monotonic() + PEERS_S
            while attempt.running() and time.monotonic() < until:
                time.sleep(0.005)
            trial.peers_ended = not attempt.running()
        attempt.kill()
        done = not any(attempt.codes.values())  # it had ended by itself just before
        return None if done else trial

    def _judge(self, resumed: int) -> None:
        """Settle the open trials: a start came to its first step, from this one."""
        if not self.open:
            assert resumed == 0
            return
        assert resumed == self.expected, (resumed, self.expected, self.heard)
        for trial in self.open:
            if trial.fault is not None:
                assert "checkpoint not used: " in self.heard and trial.named in self.heard, (
                    trial.fault.name,
                    trial.named,
                    self.heard,
                )
                trial.lost = self.newest - resumed
        self.open[0].redone = max(0, self.rows - resumed)
        self.open, self.heard = [], ""

    def _prepare(self, trial: Trial) -> None:
        """Look at what a kill left, and damage the newest checkpoint in some trials."""
        trial.unfinished = any(self.checkpoints.glob("step-*.tmp"))
        if self.open:
            return  # it came before anything was judged, let alone written
        complete = list_checkpoints(self.checkpoints)
        for checkpoint in complete:
            assert_complete(checkpoint)
        steps = [0, *map(step_of, complete)]
        self.heard, self.rows = "", len(read_rows(self.run_dir))
        self.newest = self.expected = steps[-1]
        if len(complete) > 1 and self.chance.random() < 0.6:  # or there would be nothing to find
            trial.fault = self.chance.choice(applicable(complete[-1]))
            trial.named = trial.fault.do(complete[-1], self.chance)
            self.expected = steps[-2]


def assert_complete(checkpoint: Path) -> None:
    """Assert, by means of its own, that a checkpoint with its name is one with all its bytes."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["step"] == step_of(checkpoint)
    for name, entry in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], (checkpoint, name)


def describe(trial: Trial) -> str:
    """Return a line for who watches."""
    words = [f"killed {trial.victims} at a {trial.moment}"]
    words += ["in a save"] * trial.unfinished + ["peers hung"] * (trial.peers_ended is False)
    words += [] if trial.fault is None else [trial.fault.said]
    return ", ".join(words + ["another layout next"] * trial.moved)
