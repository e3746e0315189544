"""A checkpoint of any layout goes on at any other: the same samples, the same losses."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.ranks import run_ranks
from tests.train.test_every_memory import MEMORIES
from tests.train.tiny import Shards, build_tiny, read_steps, tiny
from train.loop import train_steps
from train.settings.config import validate
from train.starting.resume import RunFolder

pytestmark = pytest.mark.gloo

LANES = 12
BEFORE, AFTER = 2, 3
SHARED: dict[str, object] = {
    "train__batch_size": LANES,
    "train__micro_batch": 1,
    "train__bptt_len": 32,
    "train__schedule": "constant",
    "model__num_kv_heads": 4,
}


class Where(NamedTuple):
    """A layout, and how many ranks it takes."""

    ranks: int
    changes: dict[str, object]


def where(ranks: int, tp: int = 1, cp: int = 1, zero: int = 1, **more: object) -> Where:
    parallel = {"parallel__tp": tp, "parallel__cp": cp, "parallel__zero": zero}
    return Where(ranks, {**SHARED, **parallel, **more})


LAYOUTS = {
    "1": where(1),
    "dp2-z3": where(2, zero=3),
    "dp4-z1": where(4),
    "dp4-z3-micro3": where(4, zero=3, train__micro_batch=3),
    "dp3": where(3),
    "dp6": where(6, zero=2),
    "tp2-dp2-z1": where(4, tp=2, parallel__sequence_parallel=False),
    "tp2-dp2-z3": where(4, tp=2, zero=3),
    "tp4-sp": where(4, tp=4),
    "tp2-cp2-z3": where(4, tp=2, cp=2, zero=3),
    "tp2-cp2-z3-micro2": where(4, tp=2, cp=2, zero=3, train__micro_batch=2),
    "cp4-contiguous": where(4, cp=4, parallel__layout="contiguous"),
    "cp2": where(2, cp=2),
    "cp2-dp2-micro6": where(4, cp=2, train__micro_batch=6),
}


class Seen(NamedTuple):
    """What a rank saw."""

    positions: list[int]  # of its micro-batches' first samples
    losses: list[float]  # of the run's steps


def go_on(raw: dict[str, Any], steps: int) -> Seen:
    """Resume where the folder's newest checkpoint stands, train so many steps, and save."""
    config = validate(raw)
    built, mesh, inputs = build_tiny(config)
    folder = RunFolder(config, built, mesh, inputs.train)
    state = folder.resume(lambda text: None)
    batches = read_steps(config, inputs, mesh, state.step + steps)[state.step :]
    positions = [batch.first_position for step in batches for batch in step]
    losses = [result.loss for result in train_steps(config, built, mesh, state, batches)]
    folder.save_now(state)
    return Seen(positions, losses)


def losses_through(
    run_dir: Path, shards: Shards, memory: Any, *legs: tuple[str, int], **changes: object
) -> list[float]:
    """Return the losses of a run that goes from layout to layout, so many steps at each."""
    found: list[float] = []
    for name, steps in legs:
        ranks, layout = LAYOUTS[name]
        raw = tiny(run_dir, shards, model__memory=memory, **layout | changes)
        seen = run_ranks(ranks, go_on, raw, steps)
        first = len(found)
        found += seen[0].losses
        # every sample of every step, by whatever rank
        read = sorted({p for rank in seen for p in rank.positions})
        micro = raw["train"]["micro_batch"]
        assert read == list(range(first * LANES, (first + steps) * LANES, micro))
    return found


PAIRS = [
    ("tp2-dp2-z1", "dp4-z1"),
    ("tp2-dp2-z1", "tp4-sp"),
    ("tp2-dp2-z1", "tp2-cp2-z3"),
    ("tp2-dp2-z3", "1"),
    ("dp2-z3", "cp4-contiguous"),
    ("cp4-contiguous", "tp2-cp2-z3"),
    ("tp4-sp", "cp2-dp2-micro6"),
    ("1", "dp4-z3-micro3"),
]
FAST = {("fam", *PAIRS[2])}
MOVES = [(memory, *pair) for memory in ("fam", "none") for pair in PAIRS]


@pytest.mark.parametrize(
    ("memory", "before", "after"),
    [pytest.param(*move, marks=() if move in FAST else pytest.mark.slow) for move in MOVES],
)
def test_a_run_goes_on_at_another_layout(
    memory: str, before: str, after: str, tmp_path: Path, shards: Shards
) -> None:
    legs = [(before, BEFORE), (after, AFTER)]
    moved = losses_through(tmp_path / "moved", shards, MEMORIES[memory], *legs)
    alone = losses_through(tmp_path / "alone", shards, MEMORIES[memory], ("1", BEFORE + AFTER))
    # float32, sums in another order (the design's contract 3)
    assert moved == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param(name, marks=() if name == "several" else pytest.mark.slow)
        for name in MEMORIES
        if name not in ("none", "fam")
    ],
)
def test_every_memory_goes_on_at_another_layout(
    memory: str, tmp_path: Path, shards: Shards
) -> None:
    # retrieval is of one CP rank; its lanes move into other micro-batches instead
    first = "tp2-dp2-z3" if memory == "retrieve" else "tp2-cp2-z3-micro2"
    then = "dp4-z3-micro3" if memory == "retrieve" else "cp2-dp2-micro6"
    legs = [(first, BEFORE), (then, AFTER)]
    moved = losses_through(tmp_path / "moved", shards, MEMORIES[memory], *legs)
    alone = losses_through(tmp_path / "alone", shards, MEMORIES[memory], ("1", BEFORE + AFTER))
    assert moved == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
def test_ranks_come_and_go(tmp_path: Path, shards: Shards) -> None:
    legs = [("dp4-z1", 1), ("dp2-z3", 2), ("dp3", 1), ("dp6", 2), ("1", 1)]
    moved = losses_through(tmp_path / "moved", shards, MEMORIES["fam"], *legs)
    alone = losses_through(tmp_path / "alone", shards, MEMORIES["fam"], ("1", 7))
    assert moved == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-6), ("bf16", 1e-3)])
@pytest.mark.parametrize("memory", ["fam", "none"])
def test_twenty_steps_later_the_losses_are_the_same(
    memory: str, precision: str, within: float, tmp_path: Path, shards: Shards
) -> None:
    # 4 ranks, 1, 2, and on from there, against the run that stays where it was
    changes = {"train__precision": precision, "train__lr": 1e-3, "train__micro_batch": LANES}
    legs = [("tp2-cp2-z3", 2), ("1", 2), ("cp2", 20)]
    moved = losses_through(tmp_path / "moved", shards, MEMORIES[memory], *legs, **changes)
    stayed = losses_through(
        tmp_path / "stayed", shards, MEMORIES[memory], ("tp2-cp2-z3", 24), **changes
    )
    assert moved == pytest.approx(stayed, rel=within)
