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
import resource
import shutil
import signal
import threading
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
from tests.train.tiny import LANES, Shards, tiny
from train.checkpoints.names import list_checkpoints, step_of
from train.reading.verify import verify as verify_runs
from train.settings.config import Config, validate

STEPS = 40
EVERY = 2
RELATIVE = 1e-6
"""Of losses where the layout changed: its sums run in another order."""
START_S = 1.5
"""About what the start of an attempt takes, for kills that come within it."""
FULL_BYTES, FULL_S = 60_000, 0.8
"""Of a file while a disk is full: more than the log takes, less than a share; and for how long."""
PEERS_S = 10.0
"""What the ranks that lose a peer get to end by themselves, before they are killed too."""


class Layout(NamedTuple):
    """How many ranks, and what of the configuration shares the work among them."""

    name: str
    ranks: int
    changes: dict[str, object]


HOME = Layout("DP 2, ZeRO 1", 2, {})
LAYOUTS: tuple[Layout, ...] = (
    HOME,
    Layout("1 rank", 1, {}),
    Layout("DP 2, ZeRO 3", 2, {"parallel__zero": 3}),
    Layout("TP 2, ZeRO 1", 2, {"parallel__tp": 2}),
    Layout("CP 2, ZeRO 2", 2, {"parallel__cp": 2, "parallel__zero": 2}),
    Layout("DP 4, ZeRO 1", 4, {}),
    Layout("TP 2 x DP 2, ZeRO 1", 4, {"parallel__tp": 2}),
    Layout("DP 2, ZeRO 1, micro-batches of 2", 2, {"train__micro_batch": 2}),
)


@dataclass
class Trial:
    """One kill, and what the starts after it made of it."""

    moment: str  # start, step, save
    victims: str  # one rank, all ranks
    unfinished: bool = False  # whether it left a save unfinished
    fault: Fault | None = None  # done to the newest checkpoint before the next start
    named: str = ""  # what must be said of the fault
    found: bool = False  # it was named, and the newest good checkpoint was taken
    loaded: bool = False  # the damaged checkpoint was
    samples: int = 0  # that the log then had not, or twice
    lost: int = 0  # steps between the newest checkpoint and the one that was taken
    redone: int = 0  # steps in the log that were done again
    moved: bool = False  # whether the next start had another layout
    peers_ended: bool | None = None  # whether ranks that lost a peer ended by themselves
    refused: bool = False  # whether a rank's disk refused writes for a moment, and it was told


@dataclass
class Drill:
    """All trials, and how their rounds ended."""

    trials: list[Trial] = field(default_factory=list)
    rounds: int = 0
    ledgers: int = 0  # rounds whose ledger has every sample once, and as the undisturbed run
    same_bits: int = 0  # rounds in one layout that ended bit for bit as the undisturbed run
    worst: float = 0.0  # largest relative difference of a loss in the other rounds
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


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

    Its failures say where a checkpoint was incomplete, a fault not found, a sample lost or read
    twice, or a loss not that of the undisturbed run. Raises AssertionError where a start fails.
    """
    chance, drill, began = random.Random(seed), Drill(), time.monotonic()
    whole = configuration(folder / "whole", shards, HOME)
    finish(HOME.ranks, whole)
    say(f"undisturbed: {STEPS} steps in {time.monotonic() - began:.1f} s")
    while len(drill.trials) < kills:
        drill.rounds += 1
        stays = drill.rounds % 2 == 1 or len(layouts) == 1
        disturbed = Round(folder / f"round-{drill.rounds}", shards, chance)
        # Several rounds even of few kills: some keep their layout, some do not.
        most = min(kills - len(drill.trials), max(8, kills // 4))
        disturbed.run((HOME,) if stays else layouts, most, say)
        drill.trials += disturbed.trials
        drill.failures += disturbed.failures
        _compare(drill, disturbed.run_dir, whole.run_dir, stays, say)
        shutil.rmtree(disturbed.run_dir)
    drill.seconds = time.monotonic() - began
    return drill


def _compare(
    drill: Drill, run_dir: Path, whole: Path, stays: bool, say: Callable[[str], None]
) -> None:
    """Compare a run with the undisturbed one: what it read, and what came of it."""
    read = verify_runs([run_dir, whole])
    drill.ledgers += read.good
    try:
        assert read.good, "; ".join(read.sentences)
        if stays:
            assert_same_bits(run_dir, whole, STEPS)
            drill.same_bits += 1
            say(f"round {drill.rounds}: the same bits")
            return
        found = difference(run_dir, whole)
        drill.worst = max(drill.worst, found)
        assert found <= RELATIVE, f"a loss differs by {found:.1e}"
        say(f"round {drill.rounds}: losses differ by {found:.1e} at most")
    except AssertionError as error:
        drill.failures.append(f"round {drill.rounds}: {error}")
        say(drill.failures[-1])


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
        self.failures: list[str] = []
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
            # Until a step is done a start may not have set aside what it found damaged.
            if trial is None or any(row["time"] > began for row in read_rows(self.run_dir)):
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
        full = -1 if self.chance.random() < 0.5 else self.chance.randrange(layout.ranks)
        wait_s = START_S + self.chance.random()
        with forked(
            layout.ranks, self.run_dir, pretrain_short_of_disk, config, full, wait_s
        ) as attempt:
            trial = self._kill(attempt, began) if kill else None
            if trial is None:
                assert attempt.wait() == [0] * layout.ranks, attempt.text()
            else:
                trial.refused = f"checkpoint, rank {full}: " in attempt.text()
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
        steps = [row["step"] for row in read_rows(self.run_dir) if row["step"] <= resumed]
        wrong = len(steps) + resumed - 2 * len(set(steps))  # twice, and not at all
        for trial in self.open:
            named = "checkpoint not used: " in self.heard and trial.named in self.heard
            trial.found = resumed == self.expected and (trial.fault is None or named)
            if trial.fault is not None:
                trial.loaded, trial.lost = resumed == self.newest, self.newest - resumed
            if not trial.found or wrong:
                self.failures.append(
                    f"{describe(trial)}: went on at step {resumed}, not {self.expected}; {wrong}"
                    f" steps not once in the log; said:\n{self.heard}"
                )
        self.open[0].samples = wrong * LANES
        self.open[0].redone = max(0, self.rows - resumed)
        self.open, self.heard = [], ""

    def _prepare(self, trial: Trial) -> None:
        """Look at what a kill left, and damage the newest checkpoint in some trials."""
        if self.open:
            return  # it came before any step was done, let alone written
        trial.unfinished = any(self.checkpoints.glob("step-*.tmp"))
        complete = list_checkpoints(self.checkpoints)
        self.failures += [fault for path in complete for fault in what_is_wrong(path)]
        steps = [0, *map(step_of, complete)]
        self.heard, self.rows = "", len(read_rows(self.run_dir))
        self.newest = self.expected = steps[-1]
        if len(complete) > 1 and self.chance.random() < 0.6:  # or there would be nothing to find
            choices = [fault for fault in applicable(complete[-1]) if not fault.refused]
            trial.fault = self.chance.choice(choices)
            trial.named = trial.fault.do(complete[-1], self.chance)
            self.expected = steps[-2]


def pretrain_short_of_disk(config: Config, full: int, wait_s: float) -> int:
    """Train; after a while rank `full` can write no share of a checkpoint for a moment."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        time.sleep(wait_s)
        # a real failure of write(2), as a full disk gives
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, limit[1]))
        time.sleep(FULL_S)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    if os.environ["RANK"] == str(full):
        threading.Thread(target=fill, daemon=True).start()
    return pretrain(config)


def what_is_wrong(checkpoint: Path) -> list[str]:
    """Return, by means of its own, what a checkpoint with its name has not of all its bytes."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    wrong = [] if manifest["step"] == step_of(checkpoint) else [f"{checkpoint}: another step"]
    for name, entry in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            wrong.append(f"{checkpoint / name}: not what was written")
    return wrong


def describe(trial: Trial) -> str:
    """Return a line for who watches."""
    words = [f"killed {trial.victims} at a {trial.moment}"]
    words += ["in a save"] * trial.unfinished + ["peers hung"] * (trial.peers_ended is False)
    words += ["a disk refused for a moment"] * trial.refused
    words += [] if trial.fault is None else [trial.fault.said]
    return ", ".join(words + ["another layout next"] * trial.moved)
