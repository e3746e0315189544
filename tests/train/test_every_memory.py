"""Every memory through training: steps, a checkpoint and on from it, evaluation, other layouts."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from data.streams import IGNORE
from model.memory.base import compact, named_tensors
from parallel.mesh import Mesh
from tests.compare import assert_each
from tests.ranks import run_ranks
from tests.train.tiny import Shards, build_tiny, masters, read_steps, tiny
from train.build import Built
from train.checkpoints.snapshot import read_model
from train.evaluation.held_out import HeldOut
from train.loop import StepResult, TrainState, train_steps
from train.settings.config import Config, ConfigError, validate
from train.settings.memories import MEMORY_CONFIGS
from train.starting.inputs import Inputs, open_inputs
from train.starting.resume import RunFolder
from train.tracking.tracker import NoTracker

pytestmark = pytest.mark.gloo

MEMORIES: dict[str, Any] = {
    "none": "none",
    "window": {"name": "window", "segments": 2},
    "fam": {"name": "fam", "slots": 4, "random_state_passing": 0.5},
    "infini": {"name": "infini", "rule": "delta"},
    "abc": {"name": "abc", "slots": 4},
    "cmab": {"name": "cmab", "latents": 4, "window": 1},
    "rmt": {"name": "rmt", "slots": 4, "state": "norm"},
    "armt": {"name": "armt", "slots": 4, "key_dim": 4},
    "hmt": {"name": "hmt", "bank": 5, "sensory": 3, "search_dim": 4, "search_from": 1},
    "landmark": {"name": "landmark", "block": 4, "window": 1},
    "retrieve": {"name": "landmark", "block": 4, "window": 1, "retrieve": 2},
    "several": ["window", {"name": "fam", "slots": 4}, "infini"],
}
ONE = {"train__micro_batch": 2, "train__bptt_len": 32, "train__schedule": "constant"}
FOUR = {**ONE, "parallel__tp": 2, "parallel__cp": 2, "parallel__zero": 3}


class Life(NamedTuple):
    """What a rank saw of a run."""

    first: StepResult  # its first step
    losses: dict[str, float]  # held out, some steps later


def live(raw: dict[str, Any]) -> Life:
    """Train two steps, save, train two; read the checkpoint and train two: the same bits."""
    config = validate(raw)
    made = build_tiny(config)
    batches = read_steps(config, made[2], made[1], 4)
    state = TrainState()
    results = list(train_steps(config, made[0], made[1], state, batches[:2]))
    folder(config, made).save_now(state)
    losses = held_out(config, made)
    again = build_tiny(config)
    resumed = folder(config, again).resume(lambda text: None)
    assert resumed.step == 2
    for carried in resumed.memory.values():
        # Elsewhere the products of some CPUs round otherwise: it must not be left to the file.
        assert all(x.data_ptr() % 64 == 0 for x in named_tensors(carried, "memory").values())
    ends = [
        [result.loss for result in train_steps(config, run[0], run[1], at, batches[2:])]
        for run, at in ((made, state), (again, resumed))
    ]
    assert ends[0] == ends[1]
    assert_each(everything(again[0], resumed), everything(made[0], state), 0.0)
    return Life(results[0], losses)


def folder(config: Config, run: tuple[Built, Mesh, Inputs]) -> RunFolder:
    return RunFolder(config, run[0], run[1], run[2].train)


def everything(built: Built, state: TrainState) -> dict[str, torch.Tensor]:
    memory = {
        f"{index}/{name}": tensor.double()
        for index, carried in state.memory.items()
        for name, tensor in named_tensors(compact(carried), "memory").items()
        if tensor.numel() and torch.isfinite(tensor.double()).all()
    }
    return masters(built) | memory


def held_out(config: Config, run: tuple[Built, Mesh, Inputs]) -> dict[str, float]:
    built, mesh, inputs = run
    assert inputs.valid is not None
    measured = HeldOut(
        config, inputs.valid, built, mesh, NoTracker(), lambda text: None, lambda: None
    )
    found = measured.evaluate(2, compare=True)
    losses = {"on": found.on, "off": found.off, "shuffled": found.shuffled}
    return {name: x.loss for name, x in losses.items() if x is not None}


def test_every_memory_is_tried_here(shards: Shards) -> None:
    names = {
        validate(tiny(Path("unused"), shards, model__memory=memory)).model.memory.name
        for memory in MEMORIES.values()
    }
    assert names == {*MEMORY_CONFIGS, "window + fam + infini"}


@pytest.mark.parametrize("name", MEMORIES)
def test_a_run_goes_on_bit_for_bit_and_is_evaluated(
    name: str, tmp_path: Path, shards: Shards
) -> None:
    raw = tiny(tmp_path / "run", shards, model__memory=MEMORIES[name], **ONE)
    (life,) = run_ranks(1, live, raw)
    assert life.losses.keys() == ({"on"} if name == "none" else {"on", "off", "shuffled"})
    assert all(0 < loss < 6 for loss in life.losses.values())
    model, config = read_model(tmp_path / "run")
    assert config.model.memory == validate(raw).model.memory
    assert model.config.vocab_size == 257 + ("block" in str(MEMORIES[name]))


FAST = ("hmt", "landmark", "several")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in MEMORIES
        if name != "retrieve"  # of one CP rank
    ],
)
def test_tp_with_scattered_rows_cp_and_zero_3_equal_one_process(
    name: str, tmp_path: Path, shards: Shards
) -> None:
    raws = [
        tiny(tmp_path / str(size), shards, model__memory=MEMORIES[name], **changes)
        for size, changes in ((1, ONE), (4, FOUR))
    ]
    (alone,) = run_ranks(1, begin, raws[0])
    for rank in run_ranks(4, begin, raws[1]):
        # float32, sums in another order (the design's contract 1)
        assert rank.first.loss == pytest.approx(alone.first.loss, rel=1e-5)
        assert rank.first.grad_norm == pytest.approx(alone.first.grad_norm, rel=1e-5)
        assert rank.first.targets == alone.first.targets
        # Adam's first step divides by gradients as small as rounding
        assert rank.losses == pytest.approx(alone.losses, rel=1e-2)


def begin(raw: dict[str, Any]) -> Life:
    """Train a step and evaluate."""
    config = validate(raw)
    made = build_tiny(config)
    batches = read_steps(config, made[2], made[1], 1)
    (result,) = train_steps(config, made[0], made[1], TrainState(), batches)
    return Life(result, held_out(config, made))


# landmarks in the data


LANDMARK = {"name": "landmark", "block": 4}


def read(raw: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Return tokens and labels of the first step, its targets, and the model's vocabulary."""
    config = validate(raw)
    built, mesh, inputs = build_tiny(config)
    (step,) = read_steps(config, inputs, mesh, 1)
    (result,) = train_steps(config, built, mesh, TrainState(), [step])
    tokens, labels = (torch.cat([getattr(b, n) for b in step]) for n in ("tokens", "labels"))
    return tokens, labels, result.targets, built.model.config.vocab_size


def test_landmarks_take_positions_and_no_loss(tmp_path: Path, shards: Shards) -> None:
    raw = tiny(tmp_path, shards, model__memory=LANDMARK)
    ((tokens, labels, targets, vocab_size),) = run_ranks(1, read, raw)
    assert vocab_size == 258  # 257 of the bytes, and the landmark
    assert tokens.shape == (4, 4, 16)
    assert tokens[..., 3::4].eq(257).all() and labels[..., 3::4].eq(IGNORE).all()
    text = torch.arange(16) % 4 != 3
    assert tokens[..., text].lt(257).all() and labels.lt(257).all()
    assert targets == int((labels != IGNORE).sum())
    # the text is that of segments as long as the text of these
    plain = tiny(tmp_path, shards, data__segment_len=12, data__sample_len=48)
    ((expected, following, _, _),) = run_ranks(1, read, plain)
    assert torch.equal(tokens[..., text], expected)
    assert torch.equal(labels[..., text], following)


def test_a_vocabulary_of_ones_own_has_room_for_the_landmark(tmp_path: Path, shards: Shards) -> None:
    changes = {"model__memory": LANDMARK, "model__vocab_size": 257}
    with pytest.raises(ConfigError) as caught:
        open_inputs(validate(tiny(tmp_path, shards, **changes)))
    assert caught.value.problems == (
        f"model.vocab_size: 257 is less than the 257 tokens of {shards.train}'s tokenizer (and a"
        " landmark, 258); use 258 or leave it out",
    )
    raw = tiny(tmp_path, shards, model__memory=LANDMARK, model__vocab_size=300)
    ((tokens, _, _, vocab_size),) = run_ranks(1, read, raw)
    assert vocab_size == 300 and tokens[..., 3::4].eq(299).all()


# the curriculum and the gates


def test_a_stage_of_the_curriculum_begins_memories_anew(tmp_path: Path, shards: Shards) -> None:
    stages = [{"until": 1, "segments": 2}]
    raw = tiny(tmp_path, shards, model__memory=MEMORIES["rmt"])
    cut, whole = (
        run_ranks(1, two_losses, tiny(tmp_path, shards, **more), cuts)[0]
        for more, cuts in (
            ({"model__memory": MEMORIES["rmt"], "train__curriculum": stages}, False),
            ({"model__memory": MEMORIES["rmt"]}, True),
        )
    )
    assert cut == whole
    assert run_ranks(1, two_losses, raw, False)[0][0] != whole[0]


def two_losses(raw: dict[str, Any], cut: bool) -> list[float]:
    """Train two steps, in the first of which documents may begin every two segments."""
    config = validate(raw)
    built, mesh, inputs = build_tiny(config)
    batches = read_steps(config, inputs, mesh, 2)
    for batch in batches[0] if cut else ():
        batch.starts[:, ::2] = True
    return [r.loss for r in train_steps(config, built, mesh, TrainState(), batches)]


@pytest.mark.parametrize("zero", [1, 3])
def test_gates_move_as_far_as_their_own_rate_says(
    zero: int, tmp_path: Path, shards: Shards
) -> None:
    moved = []
    for rate in (1.0, 8.0):
        memory = {"name": "infini", "gate_lr": rate}
        raw = tiny(tmp_path, shards, model__memory=memory, parallel__zero=zero)
        moved.append(run_ranks(2, move, raw))
    for one, eight in zip(*moved, strict=True):
        gates = {name for name in one if name.split("@")[0].endswith("gate")}
        assert_each({n: eight[n] for n in gates}, {n: 8 * one[n] for n in gates}, 1e-5)
        rest = one.keys() - gates
        assert_each({n: eight[n] for n in rest}, {n: one[n] for n in rest}, 0.0)
    gates = {n for part in moved[0] for n in part if "gate@" in n and part[n].abs().sum() > 0}
    assert {name.split("@")[0] for name in gates} == {
        f"master/blocks.{i}.mixer.parts.infini.gate" for i in range(2)
    }


def move(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return how far a step moves this rank's weights."""
    config = validate(raw | {"train": raw["train"] | {"warmup_steps": 0}})
    built, mesh, inputs = build_tiny(config)
    before = masters(built)
    list(train_steps(config, built, mesh, TrainState(), read_steps(config, inputs, mesh, 1)))
    after = masters(built)
    return {name: after[name] - x for name, x in before.items() if name.startswith("master/")}
