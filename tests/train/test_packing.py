"""Packed short documents through training: steps, a checkpoint and on from it, other layouts."""

from pathlib import Path
from typing import Any

import pytest

from data.packing import PackedStreams
from tests.ranks import run_ranks
from tests.train.attempts import read_rows
from tests.train.test_every_memory import FOUR, MEMORIES, ONE, begin, live
from tests.train.tiny import SEGMENT, Shards, build_tiny, prepare_shards, read_steps, tiny
from train.planning.expect import expect
from train.pretrain import Pretraining
from train.reading.corpora import start_course
from train.settings.config import validate
from train.signals import StopRequest
from train.speed.metrics import training_flops_per_token
from train.watch.attempt import Watch

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Documents of 5 to 30 tokens: segments of 16 hold one to three."""
    folder: Path = tmp_path_factory.mktemp("short")
    return prepare_shards(folder, documents=150, words=(1, 6))


def packed(folder: Path, short: Shards, memory: str, **changes: Any) -> dict[str, Any]:
    return tiny(folder, short, model__memory=MEMORIES[memory], data__packing=True, **changes)


@pytest.mark.parametrize("memory", ["none", "several"])
def test_a_packed_run_goes_on_bit_for_bit(memory: str, tmp_path: Path, short: Shards) -> None:
    (life,) = run_ranks(1, live, packed(tmp_path / "run", short, memory, **ONE))
    assert all(0 < loss < 6 for loss in life.losses.values())


@pytest.mark.parametrize("memory", ["fam"])
def test_packed_steps_on_tp_cp_and_zero_3_equal_one_process(
    memory: str, tmp_path: Path, short: Shards
) -> None:
    (alone,) = run_ranks(1, begin, packed(tmp_path / "1", short, memory, **ONE))
    for rank in run_ranks(4, begin, packed(tmp_path / "4", short, memory, **FOUR)):
        assert rank.first.loss == pytest.approx(alone.first.loss, rel=1e-5)
        assert rank.first.grad_norm == pytest.approx(alone.first.grad_norm, rel=1e-5)
        assert rank.first.targets == alone.first.targets > 4 * 64 * 0.7


def shares(raw: dict[str, Any]) -> tuple[float, float]:
    """Return how many tokens of the first steps are targets, and documents behind the first."""
    config = validate(raw)
    _, mesh, inputs = build_tiny(config)
    batches = [batch for step in read_steps(config, inputs, mesh, 4) for batch in step]
    targets = sum(int((batch.labels >= 0).sum()) for batch in batches)
    behind = sum(
        int((batch.documents > 0).sum()) for batch in batches if batch.documents is not None
    )
    total = sum(batch.labels.numel() for batch in batches)
    return targets / total, behind / total


def test_packing_makes_targets_of_padding(tmp_path: Path, short: Shards) -> None:
    raw = packed(tmp_path / "run", short, "none")
    (with_packing,) = run_ranks(1, shares, raw)
    raw["data"]["packing"] = False
    (without,) = run_ranks(1, shares, raw)
    assert with_packing[0] > 1.2 * without[0]
    assert with_packing[1] > 0.1 and without[1] == 0


def pretraining_flops(raw: dict[str, Any]) -> tuple[float, float, float]:
    """Return a run's FLOPs of a token, those of its packed order, and those of whole segments."""
    config = validate(raw)
    built, mesh, inputs = build_tiny(config)
    streams = PackedStreams(inputs.train.lengths, seed=0, lanes=4, segment_len=SEGMENT, segments=4)
    model = built.model.config
    course = start_course(config, inputs.train)
    watch = Watch(config, expect(config, 257, 1, None))
    run = Pretraining(config, inputs, course, built, mesh, StopRequest(), watch)
    run.run()
    packed, whole = (
        training_flops_per_token(model, SEGMENT, keys)
        for keys in (streams.keys_per_token(model.window), None)
    )
    return run.reporter.flops, packed, whole


def test_a_packed_run_counts_the_flops_of_the_keys_it_reads(tmp_path: Path, short: Shards) -> None:
    raw = packed(tmp_path / "run", short, "window", train__steps=3)
    ((counted, expected, whole),) = run_ranks(1, pretraining_flops, raw)
    assert counted == expected < whole
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [1, 2, 3]
