"""Every fault of a checkpoint is found and named, and nothing of it is loaded.

Black box: a run made by `longhaul pretrain`'s own code, its newest checkpoint damaged, and what the
next start of two ranks makes of it.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.attempts import finish, forked, pretrain, read_rows
from tests.train.faults import FAULTS, Fault
from tests.train.tiny import Shards, build_tiny, masters, tiny
from train.checkpoints import saver
from train.checkpoints.folder import list_checkpoints, verify
from train.settings.config import Config, validate
from train.starting.resume import RunFolder

pytestmark = pytest.mark.gloo

RANKS, EVERY, STEPS = 2, 2, 6
SEEDS = 3
"""Of each fault: where in which file it happens."""


class Start(NamedTuple):
    """What a start made of a run folder."""

    step: int | None  # None: it refused
    said: str
    weights: dict[str, torch.Tensor]
    left: list[str]  # in the checkpoints folder, afterwards


def settings(folder: Path, shards: Shards) -> dict[str, Any]:
    kept = {"every": EVERY, "keep": 3}
    return tiny(folder, shards, train__steps=STEPS, checkpoint=kept)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Shards) -> Path:
    """Return the folder of a run with checkpoints of steps 2, 4 and 6; nothing may write there."""
    folder: Path = tmp_path_factory.mktemp("run")
    finish(RANKS, validate(settings(folder, shards)))
    assert [path.name[-1] for path in list_checkpoints(folder / "checkpoints")] == ["2", "4", "6"]
    return folder


def start_all(folders: list[Path], shards: Shards) -> list[Start]:
    """Return what these ranks make of each folder."""
    built, mesh, inputs = build_tiny(validate(settings(folders[0], shards)))
    starts = []
    for folder in folders:
        said: list[str] = []
        config = validate(settings(folder, shards))
        try:
            runs = RunFolder(config, built, mesh, inputs.train)
            step: int | None = runs.resume(said.append).step
        except ValueError as error:
            step = None
            said.append(str(error))
        torch.distributed.barrier()
        left = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        starts.append(Start(step, "\n".join(said), masters(built), left))
    return starts


CASES = [(fault, seed) for fault in FAULTS for seed in range(SEEDS)]


def names(cases: list[tuple[Fault, int]]) -> list[str]:
    return [f"{fault.name}-{seed}" for fault, seed in cases]


class Outcome(NamedTuple):
    """One case: what must be said, and what each rank's start was."""

    named: str
    starts: tuple[Start, ...]


@pytest.fixture(scope="module")
def outcomes(
    run: Path, tmp_path_factory: pytest.TempPathFactory, shards: Shards
) -> dict[str, Outcome]:
    """Return the outcome of every case, of no fault at all, and of step 4 being the newest."""
    folders, named = [], []
    for name in (*names(CASES), "whole", "older", "all-bad", "two-bad"):
        folder = tmp_path_factory.mktemp(name) / "run"
        shutil.copytree(run, folder)
        folders.append(folder)
    for (fault, seed), folder in zip(CASES, folders, strict=False):
        newest = list_checkpoints(folder / "checkpoints")[-1]
        named.append(fault.do(newest, random.Random(seed)))
    *_, older, all_bad, two_bad = folders
    shutil.rmtree(older / "checkpoints/step-00000006")
    for folder, count in ((all_bad, 3), (two_bad, 2)):
        for checkpoint in list_checkpoints(folder / "checkpoints")[-count:]:
            FAULTS[0].do(checkpoint, random.Random(0))
    ranks = run_ranks(RANKS, start_all, folders, shards)
    starts = zip(*ranks, strict=True)
    keys = (*names(CASES), "whole", "older", "all-bad", "two-bad")
    return {
        key: Outcome(text, each)
        for key, text, each in zip(keys, [*named, "", "", "", ""], starts, strict=True)
    }


def same_weights(one: Start, other: Start) -> bool:
    return all(torch.equal(one.weights[name], other.weights[name]) for name in other.weights)


@pytest.mark.parametrize("case", names(CASES))
def test_a_fault_is_named_and_the_checkpoint_before_loaded_on_every_rank(
    case: str, outcomes: dict[str, Outcome]
) -> None:
    named, starts = outcomes[case]
    for start, older, whole in zip(
        starts, outcomes["older"].starts, outcomes["whole"].starts, strict=True
    ):
        assert start.step == 4
        assert "checkpoint not used: " in start.said and named in start.said
        assert "2 steps are lost" in start.said
        assert same_weights(start, older) and not same_weights(start, whole)
    assert starts[0].left == ["step-00000002", "step-00000004", "step-00000006.bad"]


def test_without_a_fault_the_newest_is_loaded(outcomes: dict[str, Outcome]) -> None:
    for start in outcomes["whole"].starts:
        assert start.step == STEPS
        assert "not used" not in start.said and "lost" not in start.said


def test_two_damaged_ones_are_both_named_and_passed_over(outcomes: dict[str, Outcome]) -> None:
    for start in outcomes["two-bad"].starts:
        assert start.step == 2
        assert start.said.count("checkpoint not used: ") == 2
        assert "4 steps are lost" in start.said
    assert outcomes["two-bad"].starts[0].left == [
        "step-00000002",
        "step-00000004.bad",
        "step-00000006.bad",
    ]


def test_with_all_damaged_no_rank_begins_again_unasked(outcomes: dict[str, Outcome]) -> None:
    for start in outcomes["all-bad"].starts:
        assert start.step is None
        assert "none of the 3 checkpoints" in start.said and "--fresh" in start.said
    assert outcomes["all-bad"].starts[0].left == [f"step-0000000{step}" for step in (2, 4, 6)]


def test_the_run_itself_stays_good(run: Path, outcomes: dict[str, Outcome]) -> None:
    for checkpoint in list_checkpoints(run / "checkpoints"):
        verify(checkpoint)


# a disk that refuses while a run goes on


def fill_disk(rank: int) -> None:
    if rank == 1:
        # a real failure of write(2), as a full disk gives: more than the log takes, not a share
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def make_read_only(rank: int) -> None:
    def refuse(folder: Path, step: int) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    # (tests may run as the super-user, who may write into every folder)
    vars(saver)["begin"] = refuse


def pretrain_until_refused(config: Config, refuse: Callable[[int], None]) -> int:
    """Train; after the first checkpoint the disk takes no other."""
    from train.reporting import Reporter

    vars(saver)["RETRY_AFTER_S"] = (0.01,)
    record = Reporter.step

    def hook(self: Any, state: Any, *others: Any) -> None:
        record(self, state, *others)
        if state.step == EVERY + 1:
            self.folder.wait()
            refuse(self.mesh.rank)

    Reporter.step = hook  # type: ignore[method-assign]
    return pretrain(config)


@pytest.mark.parametrize(
    ("refuse", "reason"),
    [(fill_disk, "rank 1: [Errno 27] File too large"), (make_read_only, "Read-only file system")],
)
def test_a_disk_that_refuses_is_told_and_ends_the_run_at_its_limit_with_nothing_lost(
    refuse: Callable[[int], None], reason: str, tmp_path: Path, shards: Shards
) -> None:
    raw = settings(tmp_path / "run", shards)
    raw["train"]["steps"], raw["checkpoint"]["max_failures"] = 10, 2
    config = validate(raw)
    with forked(RANKS, config.run_dir, pretrain_until_refused, config, refuse) as attempt:
        assert attempt.wait() == [1, 1]
        said = attempt.text()
    assert "again in" in said and reason in said
    assert "2 checkpoints in a row could not be saved (checkpoint.max_failures=2)" in said
    assert read_rows(config.run_dir)[-1]["step"] > 2 * EVERY  # it went on after the first
    (kept,) = list_checkpoints(config.run_dir / "checkpoints")
    assert verify(kept).step == EVERY
    assert f"resumed at step {EVERY}" in finish(RANKS, config)
    assert [row["step"] for row in read_rows(config.run_dir)] == list(range(1, 11))
