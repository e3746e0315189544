"""What only a memory of slots, or only a window, does."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import FamMemory, MemoryConfig, NoMemory, WindowMemory
from model.decoder import Decoder
from model.init import initialise
from model.loss import IGNORE
from model.memory.base import Carried, detach
from model.memory.fam import FamInitial, FamState
from tests.compare import relative
from tests.model.memories import FAM
from tests.model.small import VOCAB, Batch, batch_of, build, config_of, gradients

SLOTS = pytest.mark.parametrize("memory", FAM.values(), ids=FAM.keys())


def influence(memory: MemoryConfig, segment: int) -> Tensor:
    """The gradient of one segment's loss by the embedding of the stream's first token."""
    model, batch = build(config_of(memory)), batch_of(1, segment + 1, 4)
    batch.tokens.remainder_(VOCAB - 1)
    batch.tokens[0, 0, 0] = VOCAB - 1  # nowhere else
    batch.labels[:, :segment] = IGNORE
    batch.labels[:, segment].clamp_(min=0)
    model(batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale).loss.backward()
    return gradients(model)["embedding.weight"][VOCAB - 1]


@SLOTS
def test_the_first_token_reaches_segment_20_through_slots(memory: FamMemory) -> None:
    assert influence(memory, 20).abs().max() > 0


@pytest.mark.parametrize("segments", [1, 2])
def test_the_first_token_reaches_layers_times_window_segments_through_a_window(
    segments: int,
) -> None:
    last = 2 * segments  # two layers
    assert influence(WindowMemory(segments), last).abs().max() > 0
    assert not influence(WindowMemory(segments), last + 1).any()
    assert not influence(WindowMemory(segments), 20).any()


def stream(model: Decoder, batch: Batch, steps: int) -> Any:
    state = None
    with torch.no_grad():
        for _ in range(steps):
            logits, state = model(batch.tokens, batch.starts & (state is None), state)
            assert logits.isfinite().all()
    return state


@pytest.mark.parametrize(("first", "same"), [("hidden", True), ("prompt", False)])
def test_a_hidden_prompt_leaves_the_first_segment_of_each_document_as_it_is_without_memory(
    first: Any, same: bool
) -> None:
    """What a pre-trained model needs to begin as it was; the second segment reads the slots."""
    batch = batch_of(2, 3, 6)
    batch.starts[1, 2] = True
    logits = []
    for memory in (NoMemory(), FamMemory(slots=3, first=first)):
        model = Decoder(config_of(memory)).double()
        initialise(model, model.config, seed=0)
        with torch.no_grad():
            logits.append(model(batch.tokens, batch.starts)[0])
    without, found = logits
    for row, n in [(0, 0), (1, 0), (1, 2)]:
        assert (relative(found[row, n], without[row, n]) < 1e-12) == same
    assert relative(found[0, 1], without[0, 1]) > 1e-3


@pytest.mark.parametrize("kind", ["norm", "latch"])
def test_a_stream_of_1000_segments_stays_bounded(kind: Any) -> None:
    memory = FamMemory(slots=3, state=kind)
    model = build(config_of(memory), torch.float32)
    layers = stream(model, batch_of(1, 50, 2), 20).layers
    for block, state in zip(model.blocks, layers, strict=True):
        carried = state.parts["fam"].slots / block.mixer.parts["fam"].carry.gain
        if kind == "norm":
            rms = carried.square().mean(-1).sqrt()
            assert torch.allclose(rms, torch.ones_like(rms), atol=1e-4)
        else:
            assert carried.abs().max() <= 1 + 1e-6


def test_the_published_state_grows_with_every_segment() -> None:
    """Why `norm` and `latch` exist."""
    model = build(config_of(FamMemory(slots=3, state="paper")), torch.float32)
    short, long = (
        stream(model, batch_of(1, 50, 2), n).layers[0].parts["fam"].slots.norm() for n in (1, 4)
    )
    assert long > 2 * short


def passed_and_continued(
    memory: FamMemory,
) -> tuple[Decoder, Batch, list[dict[str, FamInitial]], Any]:
    """Slots handed on from one text, and a state that holds them as its own."""
    model, earlier = build(config_of(memory)), batch_of(2, 3, 4, seed=5)
    states = model(earlier.tokens, earlier.starts)[1]
    passed = model.memory.handed_on(states)
    batch = batch_of(2, 3, 4)
    continued = [
        state._replace(
            window=state.window._replace(age=torch.zeros(2, dtype=torch.int64)),
            parts={"fam": FamState(initial["fam"].slots.expand(2, -1, -1), torch.zeros(2).bool())},
        )
        for initial, state in zip(passed, detach(states).layers, strict=True)
    ]
    return model, batch, passed, Carried(continued, [])


@SLOTS
def test_a_document_given_slots_goes_on_from_them(memory: FamMemory) -> None:
    """Their residual counts from the first update, and the window begins empty."""
    model, batch, passed, continued = passed_and_continued(memory)
    given, _ = model(batch.tokens, batch.starts, passed=passed)
    expected, _ = model(batch.tokens, torch.zeros_like(batch.starts), continued)
    assert relative(given[..., :VOCAB], expected[..., :VOCAB]) < 1e-12


@SLOTS
def test_slots_handed_on_are_the_first_streams_and_without_gradient(memory: FamMemory) -> None:
    model, batch = build(config_of(memory)), batch_of(2, 3, 4)
    states = model(batch.tokens, batch.starts)[1]
    for passed, state in zip(model.memory.handed_on(states), states.layers, strict=True):
        initial, slots = passed["fam"], state.parts["fam"].slots
        assert torch.equal(initial.slots, slots[0])
        assert slots.requires_grad and not initial.slots.requires_grad
        assert not initial.fresh


@SLOTS
def test_the_prompt_has_a_gradient_of_zero_where_slots_are_given(memory: FamMemory) -> None:
    """Not None: ZeRO waits for every parameter's gradient."""
    model, batch, passed, _ = passed_and_continued(memory)
    model(
        batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale, passed=passed
    ).loss.backward()
    assert not gradients(model)["memory.parts.fam.prompt"].any()


@SLOTS
def test_the_prompt_has_a_gradient_at_a_start(memory: FamMemory) -> None:
    model, batch = build(config_of(memory)), batch_of(2, 3, 4)
    model(batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale).loss.backward()
    assert gradients(model)["memory.parts.fam.prompt"].abs().max() > 1e-4


@SLOTS
def test_where_queries_stand_matters(memory: FamMemory) -> None:
    other = "previous" if memory.query_position == "current" else "current"
    batch = batch_of(1, 2, 4)
    logits = [
        build(config_of(m))(batch.tokens, batch.starts)[0]
        for m in (memory, replace(memory, query_position=other))
    ]
    assert torch.equal(logits[0][:, 0], logits[1][:, 0])
    assert not torch.equal(logits[0][:, 1], logits[1][:, 1])
