"""The Hierarchical Memory Transformer against full masks, its two stages, bank and summaries."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import HmtMemory
from model.decoder import Decoder
from model.memory.hmt import Hmt, HmtState
from model.stream import Stream
from tests.compare import relative
from tests.model.slow import EXACT, assert_twin
from tests.model.slow_turns import SlowHmt, SlowHmtFirstStage
from tests.model.small import VOCAB, Batch, batch_of, build, config_of, gradients

FROM = 10
"""The step at which search begins."""

STAGES = {"first": FROM - 1, "second": FROM, "after training": None}


def hmt(bank: int = 3, sensory: int = 2, window: int = 0) -> HmtMemory:
    return HmtMemory(bank, sensory, search_dim=4, search_from=FROM, window=window)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("sensory", [0, 2, 5])
@pytest.mark.parametrize("bank", [1, 3])
def test_is_the_stack_under_its_full_mask(bank: int, sensory: int, window: int, stage: str) -> None:
    """Logits and every gradient: summaries, search, a full bank, sensory tokens, late rows."""
    batch = batch_of(2, 5, 5)
    batch.starts[1, 1] = True
    twin = SlowHmtFirstStage if stage == "first" else SlowHmt
    assert_twin(config_of(hmt(bank, sensory, window)), twin, batch, step=STAGES[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_has_a_gradient_in_every_stage(stage: str) -> None:
    """ZeRO waits for each. Those of the search are 0 until it begins, and none is after."""
    model, batch = build(config_of(hmt())), batch_of(2, 4, 6)
    model(
        batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale, step=STAGES[stage]
    ).loss.backward()
    search = {"memory.query.weight", "memory.key.weight", "memory.prompt"}
    for name, grad in gradients(model).items():
        assert bool(grad.any()) == (stage != "first" or name not in search), name


def run(model: Decoder, batch: Batch, state: Any = None, step: int | None = None) -> Any:
    with torch.no_grad():
        logits, after = model(batch.tokens, batch.starts, state, step=step)
    return logits[..., :VOCAB], after


def test_the_first_half_reads_nothing_that_was_searched() -> None:
    """Search needs the first half's summary: with it and without, the first half is the same."""
    model, batch = build(config_of(hmt())), batch_of(2, 4, 6)
    _, state = run(model, batch.segments(0, 3))
    searched, without = (
        run(model, batch.segments(3, 4), state, step)[0] for step in (FROM, FROM - 1)
    )
    assert relative(searched[:, :, :3], without[:, :, :3]) < EXACT
    assert relative(searched[:, :, 3:], without[:, :, 3:]) > 1e-3


def test_the_bank_is_first_in_first_out() -> None:
    model, batch = build(config_of(hmt(bank=3))), batch_of(2, 6, 4)
    batch.starts[1, 4] = True
    state, before = None, torch.zeros(2, 3, 16, dtype=torch.float64)
    for n in range(6):
        _, state = run(model, batch.segments(n, n + 1), state)
        stack: HmtState = state.stack
        assert torch.equal(stack.bank[:, :-1], before[:, 1:])
        assert not torch.equal(stack.bank[:, -1], before[:, -1])
        assert stack.filled.tolist() == [min(n + 1, 3), min(n + 1, 3) if n < 4 else n - 3]
        assert torch.equal(stack.sensory, batch.tokens[:, n, -2:])
        before = stack.bank


def test_an_evicted_memory_changes_nothing() -> None:
    model, batch = build(config_of(hmt(bank=2))), batch_of(2, 4, 6)
    _, state = run(model, batch.segments(0, 3))
    assert state.stack.filled.tolist() == [2, 2]
    logits, after = run(model, batch.segments(3, 4), state)
    stack = state.stack
    oldest = stack.bank + torch.tensor([1.0, 0.0])[:, None]
    changed, _ = run(model, batch.segments(3, 4), state._replace(stack=stack._replace(bank=oldest)))
    assert relative(changed, logits) > 1e-3  # the oldest that is kept is searched
    assert torch.equal(after.stack.bank[:, 0], stack.bank[:, 1])  # and goes with the next


def memory_of(model: Decoder) -> Hmt:
    assert isinstance(model.memory, Hmt)
    return model.memory


def test_summaries_of_all_segments_at_once_are_those_one_by_one() -> None:
    model, batch = build(config_of(hmt(window=1))), batch_of(2, 5, 6)

    def summaries(part: Batch) -> list[Tensor]:
        segments = model.segments(part.tokens, part.starts, fresh=False)
        prepared = memory_of(model).prepare(model, part.tokens, segments, None)
        return [item.summary for item in prepared if item.summary is not None]

    together = torch.stack(summaries(batch))
    alone = torch.stack([summaries(batch.segments(n, n + 1))[0] for n in range(5)])
    assert together.shape == (5, 2, 16)
    assert relative(together, alone) < EXACT


def test_the_search_is_a_softmax_of_the_filled_bank() -> None:
    """Scores are scaled by sqrt(search_dim), for training and for generation alike."""
    model = build(config_of(hmt(bank=4)))
    memory, generator = memory_of(model), torch.Generator().manual_seed(0)
    bank = torch.randn(3, 4, 16, generator=generator, dtype=torch.float64)
    summary = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    filled = torch.tensor([4, 1, 0])
    state = HmtState(bank, filled, torch.zeros(3, 2, dtype=torch.int64))
    found = memory.attention(summary, state)
    keys = bank[0] @ memory.key.weight.T
    expected = (keys @ (memory.query.weight @ summary[0]) / 2).softmax(0)
    assert relative(found[0], expected) < EXACT
    assert torch.equal(found[1], torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64))
    assert not found[2].any()


def test_a_checkpoint_of_the_first_stage_is_read_without_search() -> None:
    """search_from=None, in one call and token by token, is what training at step 0 computes."""
    memory = HmtMemory(bank=3, sensory=2, search_dim=4, search_from=10)
    batch = batch_of(1, 3, 6)
    trained, _ = build(config_of(memory))(batch.tokens, batch.starts, step=0)
    model = build(config_of(replace(memory, search_from=None)))
    loaded, _ = model(batch.tokens, batch.starts)
    assert torch.equal(trained, loaded)
    read = Stream(model, 6).read_all(batch.tokens.flatten(1)[:, :16])
    assert relative(read, trained.flatten(1, 2)[:, :16]) < 1e-10
