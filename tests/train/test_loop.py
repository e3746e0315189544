"""The step: one global mean, whatever the ranks, micro-batches and windows; bad steps skipped."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.streams import IGNORE, Batch
from model.decoder import Decoder
from model.init import initialise
from model.memory.base import detach, named_tensors
from tests.cases import case
from tests.compare import assert_each, relative
from tests.ranks import run_ranks
from tests.train.attempts import (
    assert_same_bits,
    checkpoint_names,
    forked,
    manifest_of,
    pretrain,
    pretrain_holding,
    read_rows,
    tensors_of,
)
from tests.train.tiny import (
    Shards,
    build_tiny,
    masters,
    read_steps,
    tiny,
    tiny_config,
    without_targets,
)
from train.build import Built, to_model_config
from train.loop import TrainState, takes_passed_state, train_steps
from train.settings.config import Config, validate

pytestmark = pytest.mark.gloo

CLOSE = 1e-5
"""Relative, float32: sums in another order (the design's contract 1)."""


class Trained(NamedTuple):
    """What a rank has after some steps."""

    losses: list[float]
    norms: list[float | None]
    targets: list[int]
    shares: dict[str, Tensor]
    memory: dict[str, Tensor]
    state: TrainState


def uneven(batches: list[list[Batch]]) -> list[list[Batch]]:
    """Take most targets from lane 0 and all from lane 2."""
    return [
        [without_targets(without_targets(batch, 0, 5), 2, 0) for batch in step] for step in batches
    ]


def train_tiny(
    config: Config,
    steps: int,
    change: Callable[[list[list[Batch]]], list[list[Batch]]] | None = None,
    tamper: Callable[[Built, int], Any] | None = None,
) -> Trained:
    """Train on these ranks; `tamper` (built, step) is called before every step."""
    built, mesh, inputs = build_tiny(config)
    batches = read_steps(config, inputs, mesh, steps)
    if change is not None:
        batches = change(batches)
    state = TrainState()

    def told() -> Iterator[list[Batch]]:
        for step, batch in enumerate(batches):
            if tamper is not None:
                tamper(built, step)
            yield batch

    results = list(train_steps(config, built, mesh, state, told()))
    return Trained(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        [result.targets for result in results],
        masters(built),
        {
            f"{index}/{name}": tensor
            for index, memory in state.memory.items()
            for name, tensor in named_tensors(memory, "m").items()
        },
        state,
    )


def plain(config: Config) -> Decoder:
    """Return the model of one process, no engine around it."""
    model_config = to_model_config(config, 257)
    model = Decoder(model_config)
    initialise(model, model_config, config.seed)
    return model


def gradient_norm(model: Decoder) -> float:
    # in windows of one segment nothing reads what the last layer's slots became
    return float(
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    )


# one global mean


@pytest.mark.parametrize("zero", [1, 3])
def test_ranks_with_uneven_targets_equal_one_process(zero: int, shards: Shards) -> None:
    config = tiny_config(shards, parallel__zero=zero)
    (alone,) = run_ranks(1, train_tiny, tiny_config(shards, train__micro_batch=4), 3, uneven)
    ranks = run_ranks(2, train_tiny, config, 3, uneven)
    assert alone.targets[0] < 4 * 64 - 59 - 64 + 4  # lanes 0 and 2 lost theirs
    for rank in ranks:
        assert rank.targets == alone.targets
        assert rank.losses == pytest.approx(alone.losses, rel=CLOSE)
        assert rank.norms == pytest.approx(alone.norms, rel=CLOSE)


def test_the_loss_is_the_mean_over_all_targets(shards: Shards) -> None:
    config = tiny_config(shards)
    (found,) = run_ranks(1, first_loss_by_hand, config)
    (trained,) = run_ranks(1, train_tiny, config, 1, uneven)
    assert trained.losses[0] == pytest.approx(found, rel=CLOSE)


def first_loss_by_hand(config: Config) -> float:
    _, mesh, inputs = build_tiny(config)
    total, count = 0.0, 0
    for batch in uneven(read_steps(config, inputs, mesh, 1))[0]:
        with torch.no_grad():
            output = plain(config)(
                batch.tokens, batch.starts, labels=batch.labels, scale=torch.ones(())
            )
        total += output.token_losses.double().sum().item()
        count += int((batch.labels != IGNORE).sum())
    return total / count


def test_micro_batches_equal_one_big_batch(shards: Shards) -> None:
    (small,) = run_ranks(1, train_tiny, tiny_config(shards, train__micro_batch=1), 1, uneven)
    (big,) = run_ranks(1, train_tiny, tiny_config(shards, train__micro_batch=4), 1, uneven)
    assert small.losses == pytest.approx(big.losses, rel=CLOSE)
    assert small.norms == pytest.approx(big.norms, rel=CLOSE)
    # one step: exp_avg is the clipped gradient times 1 - beta1
    gradients = [
        {name: x for name, x in trained.shares.items() if name.startswith("exp_avg/")}
        for trained in (small, big)
    ]
    assert_each(gradients[0], gradients[1], CLOSE)


def nothing(batches: list[list[Batch]]) -> list[list[Batch]]:
    """Take all targets, as in the padding at an epoch's end."""
    return [
        [batch._replace(labels=torch.full_like(batch.labels, IGNORE)) for batch in step]
        for step in batches
    ]


def test_a_step_without_a_target_has_no_loss_and_no_gradient(shards: Shards) -> None:
    (trained,) = run_ranks(1, train_tiny, tiny_config(shards), 2, nothing)
    assert trained.losses == [0.0, 0.0]
    assert trained.norms == [0.0, 0.0]


# windows


def norm_by_hand(config: Config) -> float:
    """Return the gradient norm of the first step, window by window, nothing but autograd."""
    _, mesh, inputs = build_tiny(config)
    model = plain(config)
    (step,) = read_steps(config, inputs, mesh, 1)
    scale = torch.tensor(1.0 / sum(int((batch.labels != IGNORE).sum()) for batch in step))
    for batch in step:
        state = None
        for first in range(0, config.num_segments, config.bptt_segments):
            part = slice(first, first + config.bptt_segments)
            output = model(
                batch.tokens[:, part],
                batch.starts[:, part],
                state,
                labels=batch.labels[:, part],
                scale=scale,
            )
            output.loss.backward()
            state = detach(output.state)
    return gradient_norm(model)


@pytest.mark.parametrize("zero", [1, 3])
def test_the_gradient_is_that_of_each_window_by_itself(zero: int, shards: Shards) -> None:
    norms = {}
    for length in (16, 32, 64):
        config = tiny_config(shards, train__bptt_len=length, parallel__zero=zero)
        (trained,) = run_ranks(1, train_tiny, config, 1)
        (expected,) = run_ranks(1, norm_by_hand, config)
        assert trained.norms[0] == pytest.approx(expected, rel=CLOSE)
        norms[length] = expected
    # or it would not matter where gradients end
    assert abs(norms[16] / norms[64] - 1) > 1e-4
    assert abs(norms[32] / norms[64] - 1) > 1e-4


def test_windows_do_not_change_the_loss(shards: Shards) -> None:
    found = [
        run_ranks(1, train_tiny, tiny_config(shards, train__bptt_len=n), 1)[0].losses[0]
        for n in (16, 64)
    ]
    assert found[0] == pytest.approx(found[1], rel=CLOSE)


def test_memory_is_handed_from_step_to_step(shards: Shards) -> None:
    (kept,) = run_ranks(1, train_tiny, tiny_config(shards), 2)
    (lost,) = run_ranks(1, train_tiny, tiny_config(shards), 2, first_segments_start)
    assert kept.losses[0] == lost.losses[0]
    assert relative(torch.tensor(lost.losses[1]), torch.tensor(kept.losses[1])) > 1e-6


def first_segments_start(batches: list[list[Batch]]) -> list[list[Batch]]:
    """Begin every sample with a new document: what came before it is forgotten."""
    for step in batches:
        for batch in step:
            batch.starts[:, 0] = True
    return batches


# steps that are not finite


class Poison:
    """Spoils one step on one rank: its loss, or a weight's gradient."""

    def __init__(self, what: str, step: int, rank: int) -> None:
        self.what, self.step, self.rank = what, step, rank
        self.undo: Callable[[], Any] = lambda: None

    def __call__(self, built: Built, step: int) -> None:
        self.undo()
        self.undo = lambda: None
        if step != self.step or dist.get_rank() != self.rank:
            return
        if self.what == "gradient":
            weight = built.model.get_parameter("blocks.0.ffn.down.weight")
            self.undo = weight.register_hook(lambda grad: grad * float("inf")).remove
        else:
            forward = built.model.forward

            def spoil(*args: Any, **more: Any) -> Any:
                output = forward(*args, **more)
                return output._replace(loss=output.loss + float("inf"))  # its gradient is finite

            built.model.forward = spoil  # type: ignore[method-assign]
            self.undo = lambda: setattr(built.model, "forward", forward)


def train_poisoned(config: Config) -> tuple[Trained, dict[str, Trained]]:
    """Return two steps' result, and those of a third which is poisoned on rank 1."""
    poisoned = {}
    for what in ("gradient", "loss"):
        with case(what):
            poisoned[what] = train_tiny(config, 3, tamper=Poison(what, 2, 1))
    return train_tiny(config, 2), poisoned


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_step_poisoned_on_one_rank_changes_nothing_on_any(
    zero: int, precision: str, shards: Shards
) -> None:
    config = tiny_config(shards, parallel__zero=zero, train__precision=precision)
    for before, poisoned in run_ranks(2, train_poisoned, config):
        for what, after in poisoned.items():
            with case(what):
                assert_unchanged(before, after)


def assert_unchanged(before: Trained, after: Trained) -> None:
    assert after.norms[2] is None
    assert before.norms == after.norms[:2]
    assert (after.state.step, after.state.updates, after.state.skipped) == (3, 2, 1)
    assert before.shares.keys() == after.shares.keys()
    changed = [
        name for name in before.shares if not torch.equal(before.shares[name], after.shares[name])
    ]
    assert changed == []


def test_a_poisoned_rank_of_tp_and_cp_skips_on_all(shards: Shards) -> None:
    config = tiny_config(shards, parallel__tp=2, parallel__cp=2)
    for rank in run_ranks(4, train_tiny, config, 3, None, Poison("gradient", 1, 2)):
        assert [norm is None for norm in rank.norms] == [False, True, False]


def test_training_goes_on_after_a_skipped_step(shards: Shards) -> None:
    (trained,) = run_ranks(1, train_tiny, tiny_config(shards), 4, None, Poison("loss", 1, 0))
    assert [norm is None for norm in trained.norms] == [False, True, False, False]
    assert trained.state.skipped == 0
    assert trained.losses[3] < trained.losses[0]


def test_after_a_skipped_step_no_lane_reads_what_it_read_before(shards: Shards) -> None:
    """The document that ended inside the skipped step is not what the next step goes on with."""
    config = tiny_config(shards, model__memory={"name": "infini", "window": 1}, train__lr=1e-30)
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"warmup_steps": 0})}
    )

    def other_text(batches: list[list[Batch]]) -> list[list[Batch]]:
        first = [batch._replace(tokens=(batch.tokens * 7 + 3) % 250) for batch in batches[0]]
        return [first, *batches[1:]]

    (one,), (other,) = (
        run_ranks(1, train_tiny, config, 3, change, Poison("loss", 1, 0))
        for change in (None, other_text)
    )
    assert one.norms[1] is None and one.losses[0] != other.losses[0]
    assert one.losses[2] == other.losses[2]


def pretrain_poisoned(config: Config, *steps: int) -> int:
    """Train, the last rank's loss not finite in these steps of the attempt, counted from 1."""
    spoil_losses(*steps)
    return pretrain(config)


def spoil_losses(*steps: int) -> None:
    import train.loop

    poison = train.loop.poison
    count = [0]

    def spoil(loss: Tensor, total: Tensor, mesh: Any, cut: float) -> Tensor:
        count[0] += 1
        if count[0] in steps and mesh.rank == mesh.world_size - 1:
            total.fill_(float("nan"))
        return poison(loss, total, mesh, cut)

    train.loop.poison = spoil


def test_the_samples_of_a_skipped_step_are_named(tmp_path: Path, shards: Shards) -> None:
    config = validate(tiny(tmp_path / "run", shards, train__steps=4))
    with forked(2, config.run_dir, pretrain_poisoned, config, 3) as attempt:
        assert attempt.wait() == [0, 0], attempt.text()
        text = attempt.text()
    # step 3 of 4 lanes
    assert "step 3 skipped: loss not finite (nan), samples 8 to 11; 1 in a row" in text
    assert [row["step"] for row in read_rows(config.run_dir)] == [1, 2, 3, 4]
    assert manifest_of(config.run_dir, 4)["updates"] == 3


def test_too_many_in_a_row_stop_with_an_error_and_a_checkpoint(
    tmp_path: Path, shards: Shards
) -> None:
    changes = {"train__steps": 9, "train__max_nonfinite": 2, "checkpoint__every": 3}
    config = validate(tiny(tmp_path / "run", shards, **changes))
    with forked(2, config.run_dir, pretrain_poisoned, config, 2, 4, 5) as attempt:
        assert attempt.wait() == [1, 1]
        text = attempt.text()
    assert "2 steps in a row were skipped (train.max_nonfinite=2)" in text
    assert checkpoint_names(config.run_dir) == ["latest", "step-00000003", "step-00000005"]
    assert manifest_of(config.run_dir, 5)["nonfinite"] == 2
    good, last = (tensors_of(config.run_dir, n)["rank-00000.safetensors"] for n in (3, 5))
    assert [name for name in last if not torch.equal(good[name], last[name])] == []
    lost = good.keys() - last.keys()
    assert lost and all(name.startswith("memory/") for name in lost)  # it begins anew
    assert not (config.run_dir / "DONE").exists()


def test_skipped_steps_around_a_kill_count_as_without_it(tmp_path: Path, shards: Shards) -> None:
    # AdamW counts updates, not steps, and the row of bad steps goes on: both are saved
    broken, whole = (
        validate(tiny(tmp_path / name, shards, train__steps=6, checkpoint__every=every))
        for name, every in (("broken", 3), ("whole", 6))
    )
    with forked(1, whole.run_dir, pretrain_poisoned, whole, 3, 4) as attempt:
        assert attempt.wait() == [0], attempt.text()
    with forked(1, broken.run_dir, pretrain_poisoned_holding, broken, 3, 4) as attempt:
        attempt.wait_for_rows(4)
        attempt.wait_for(lambda: "step-00000003" in checkpoint_names(broken.run_dir))
        attempt.kill()
    with forked(1, broken.run_dir, pretrain_poisoned, broken, 1) as attempt:
        assert attempt.wait() == [0], attempt.text()
        text = attempt.text()
    assert "resumed at step 3" in text
    assert "step 4 skipped: " in text and "samples 12 to 15; 2 in a row" in text
    assert_same_bits(broken.run_dir, whole.run_dir, 6)
    assert manifest_of(broken.run_dir, 6)["updates"] == 4


def pretrain_poisoned_holding(config: Config, step: int, hold: int) -> int:
    spoil_losses(step)
    return pretrain_holding(config, hold)


# random state passing


def passing(shards: Shards, probability: float, **changes: object) -> Config:
    memory = {"name": "fam", "slots": 4, "window": 1, "random_state_passing": probability}
    return tiny_config(shards, model__memory=memory, **changes)


def test_passing_is_a_function_of_seed_and_step(shards: Shards) -> None:
    config = passing(shards, 0.5)
    one = [takes_passed_state(config, step) for step in range(200)]
    torch.manual_seed(123)  # nobody's generator has a say
    assert [takes_passed_state(config, step) for step in range(200)] == one
    other = passing(shards, 0.5, seed=1)
    assert [takes_passed_state(other, step) for step in range(200)] != one


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.8, 1.0])
def test_passing_is_as_frequent_as_asked(probability: float, shards: Shards) -> None:
    config = passing(shards, probability)
    found = sum(takes_passed_state(config, step) for step in range(4000)) / 4000
    # four standard deviations
    assert abs(found - probability) <= 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_any_seed_will_do(shards: Shards) -> None:
    assert takes_passed_state(passing(shards, 1.0, seed=2**63 - 1), 10**9)


def test_a_memory_without_slots_passes_none(shards: Shards) -> None:
    config = tiny_config(shards, model__memory={"name": "window", "segments": 1})
    assert not any(takes_passed_state(config, step) for step in range(10))


def test_the_state_passed_on_is_the_first_lanes_on_all_ranks(shards: Shards) -> None:
    ranks = run_ranks(2, train_tiny, passing(shards, 1.0), 2)
    for layer in range(2):
        first = ranks[0].state.memory[0].layers[layer].parts["fam"].slots[0]
        assert not torch.equal(first, ranks[1].state.memory[0].layers[layer].parts["fam"].slots[0])
        for rank in ranks:
            assert torch.equal(rank.state.passed[layer]["fam"].slots, first)
            assert rank.state.passed[layer]["fam"].fresh.item() is False


def test_passed_state_changes_what_documents_begin_with(shards: Shards) -> None:
    (off,), (on,) = (run_ranks(1, train_tiny, passing(shards, p), 2, begin) for p in (0.0, 1.0))
    assert on.losses[0] == off.losses[0]  # nothing to pass on yet
    assert relative(torch.tensor(on.losses[1]), torch.tensor(off.losses[1])) > 1e-6


def begin(batches: list[list[Batch]]) -> list[list[Batch]]:
    """Make every segment the first of a document."""
    return [
        [batch._replace(starts=torch.ones_like(batch.starts)) for batch in step] for step in batches
    ]
