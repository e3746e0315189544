"""The suite every memory must pass: one list of configurations (memories.py), one run each."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import (
    ComputeConfig,
    FamMemory,
    HmtMemory,
    LandmarkMemory,
    MemoryConfig,
    NoMemory,
    WindowMemory,
)
from model.decoder import Decoder, Output
from model.loss import IGNORE
from model.memory.base import compact, detach, named_tensors
from tests.cases import case
from tests.compare import assert_each, relative
from tests.model.algorithm_2 import Algorithm2
from tests.model.memories import MEMORIES
from tests.model.slow import EXACT, assert_twin
from tests.model.small import VOCAB, Batch, batch_of, build, config_of, gradients

ALGORITHM_2 = {
    name: memory
    for name, memory in MEMORIES.items()
    if isinstance(memory, NoMemory | WindowMemory | FamMemory)
}

MEMORY = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())

WITHOUT_PAST = (NoMemory(), LandmarkMemory(block=2))
"""Nothing of an earlier segment is read."""


def run(model: Decoder, batch: Batch, state: Any = None) -> Output:
    output: Output = model(
        batch.tokens, batch.starts, state, labels=batch.labels, scale=batch.scale, step=0
    )
    return output


def logits_of(model: Decoder, batch: Batch, state: Any = None) -> tuple[Tensor, Any]:
    with torch.no_grad():
        logits, after = model(batch.tokens, batch.starts, state, step=0)
    return logits[..., :VOCAB], after


def state_sum(state: Any) -> Tensor:
    """A scalar that gives every floating-point tensor of the state an O(1) gradient."""
    total = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(named_tensors(state, "").values()):
        if x.is_floating_point():
            generator = torch.Generator().manual_seed(i)
            total = total + (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
    return total


@MEMORY
def test_a_changed_token_leaves_every_earlier_logit_bit_identical(memory: MemoryConfig) -> None:
    model, batch = build(config_of(memory), torch.float32), batch_of(2, 4, 6)
    before, _ = logits_of(model, batch)
    for place in [(0, 0), (0, 3), (0, 5), (1, 0), (1, 4), (3, 2)]:
        tokens = batch.tokens.clone()
        tokens[0, *place] = (tokens[0, *place] + 1) % VOCAB
        after, _ = logits_of(model, batch._replace(tokens=tokens))
        here = place[0] * 6 + place[1]
        changed = (before != after).any(-1).flatten(1)
        with case(place):
            assert not changed[0, :here].any()
            assert changed[0, here]


@MEMORY
def test_rows_of_a_batch_are_independent(memory: MemoryConfig) -> None:
    model, batch = build(config_of(memory), torch.float32), batch_of(3, 4, 6)
    batch.starts[1, 2] = True
    before, _ = logits_of(model, batch)
    batch.tokens[1] = (batch.tokens[1] + 1) % VOCAB
    batch.starts[1] = torch.tensor([True, True, False, True])
    after, _ = logits_of(model, batch)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


@MEMORY
def test_a_new_document_resets(memory: MemoryConfig) -> None:
    """Outputs from a start on, in the next forward too, are those of a fresh stream."""
    model, batch = build(config_of(memory)), batch_of(2, 5, 6)
    batch.starts[1, 2] = True
    fresh, fresh_state = logits_of(model, batch.segments(2, 4).rows(slice(1, 2)))
    fresh_later, _ = logits_of(model, batch.segments(4, 5).rows(slice(1, 2)), fresh_state)
    at_once, after = logits_of(model, batch.segments(0, 4))
    _, carried = logits_of(model, batch.segments(0, 2))
    ways = {
        "one forward": (at_once[:, 2:], after),
        "carried": logits_of(model, batch.segments(2, 4), carried),
    }
    for way, (logits, state) in ways.items():
        later, _ = logits_of(model, batch.segments(4, 5), state)
        with case(way):
            assert relative(logits[1:], fresh) < EXACT
            assert relative(later[1:], fresh_later) < EXACT


@MEMORY
def test_no_gradient_reaches_the_document_before(memory: MemoryConfig) -> None:
    model, batch = build(config_of(memory)), batch_of(2, 4, 6)
    old, new = batch.segments(0, 2), batch.segments(2, 4)
    old.tokens.remainder_(VOCAB // 2)  # views: so that the table's rows tell old from new
    new.tokens.remainder_(VOCAB // 2).add_(VOCAB // 2)
    new.starts[:, 0] = True
    old.labels.fill_(IGNORE)
    for way in ("one forward", "carried"):
        output = (
            run(model, batch) if way == "one forward" else run(model, new, run(model, old).state)
        )
        output.loss.backward()
        table = gradients(model)["embedding.weight"]
        with case(way):
            assert not table[: VOCAB // 2].any()
            assert table[VOCAB // 2 :].abs().max() > 1e-4


@MEMORY
def test_a_document_that_goes_on_does_not_reset(memory: MemoryConfig) -> None:
    model, batch = build(config_of(memory)), batch_of(1, 3, 6)
    _, state = logits_of(model, batch.segments(0, 2))
    on, _ = logits_of(model, batch.segments(2, 3), state)
    fresh, _ = logits_of(model, batch.segments(2, 3))
    assert torch.equal(on, fresh) == (memory in WITHOUT_PAST)


@MEMORY
def test_only_detach_cuts_the_gradient_of_the_past(memory: MemoryConfig) -> None:
    if isinstance(memory, HmtMemory):
        memory = replace(memory, sensory=0)  # tokens that are read again are no state
    model, batch = build(config_of(memory)), batch_of(2, 4, 6)
    past, now = batch.segments(0, 2), batch.segments(2, 4)
    past.tokens.remainder_(VOCAB // 2)  # so that the table's rows tell past from now
    now.tokens.remainder_(VOCAB // 2).add_(VOCAB // 2)
    state = run(model, past).state
    of_past = {}
    for way, before in {"detached": detach(state), "carried": state}.items():
        run(model, now, before).loss.backward()
        of_past[way] = gradients(model)["embedding.weight"][: VOCAB // 2]
    assert not of_past["detached"].any()
    if memory in WITHOUT_PAST:
        assert not of_past["carried"].any()
    else:
        assert of_past["carried"].abs().max() > 1e-4


@MEMORY
def test_segment_by_segment_equals_all_at_once(memory: MemoryConfig) -> None:
    """Losses, the final state, every parameter's gradient and that of the state carried in.

    But for blocks that were stored before: a store's buffers are no part of a graph.
    """
    model, batch = build(config_of(memory)), batch_of(2, 6, 4)
    batch.starts[0, 3] = batch.starts[1, 1] = batch.starts[1, 5] = True
    before = detach(run(model, batch.segments(0, 1)).state)
    rest = batch.segments(1, 6)
    results = []
    for steps in ([(0, 5)], [(n, n + 1) for n in range(5)], [(0, 2), (2, 5)]):
        carried = detach(before)
        leaves = {
            name: x.requires_grad_()
            for name, x in named_tensors(carried, "state").items()
            if x.is_floating_point() and x.numel() and "/store/" not in name
        }
        state, loss, token_losses = carried, torch.zeros(()), []
        for first, end in steps:
            output = run(model, rest.segments(first, end), state)
            state, loss = output.state, loss + output.loss
            token_losses.append(output.token_losses)
        state = compact(state)
        (loss + 0.1 * state_sum(state)).backward()
        result = gradients(model) | named_tensors(state, "after")
        result["losses"] = torch.cat(token_losses, 1)
        for name, x in leaves.items():
            assert x.grad is not None
            result[f"gradient of {name}"] = x.grad
        results.append(result)
    assert_each(results[1], results[0], EXACT)
    assert_each(results[2], results[0], EXACT)


@MEMORY
def test_reading_without_logits_remembers_the_same(memory: MemoryConfig) -> None:
    model, batch = build(config_of(memory)), batch_of(2, 6, 6)
    batch.starts[1, 1] = batch.starts[0, 4] = True
    parts = [batch.segments(*ends) for ends in ((0, 2), (2, 5), (5, 6))]
    expected, state = None, None
    for part in parts[:2]:
        _, expected = logits_of(model, part, expected)
        state = model.read(part.tokens, part.starts, state, step=0)
    last = parts[2]
    with torch.no_grad():
        logits, _ = model(last.tokens, last.starts, state, step=0)
    assert relative(logits[..., :VOCAB], logits_of(model, last, expected)[0]) < EXACT


def loss_and_gradients(
    memory: MemoryConfig, compute: ComputeConfig, batch: Batch
) -> dict[str, Tensor]:
    model = build(config_of(memory), compute=compute)
    output = run(model, batch)
    output.loss.backward()
    return gradients(model) | {"loss": output.loss, "losses": output.token_losses}


@MEMORY
def test_how_it_is_computed_changes_no_number(memory: MemoryConfig) -> None:
    batch = batch_of(2, 3, 4)
    batch.starts[0, 1] = True
    plain = loss_and_gradients(memory, ComputeConfig(), batch)
    for compute in (
        ComputeConfig("selective"),
        ComputeConfig("block"),
        ComputeConfig(ffn_chunk=7),
        ComputeConfig(loss_chunk=7),
        ComputeConfig("selective", loss_chunk=24, ffn_chunk=24),
        ComputeConfig("block", loss_chunk=1, ffn_chunk=16),
    ):
        with case(compute):
            assert_each(loss_and_gradients(memory, compute, batch), plain, EXACT)


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@MEMORY
def test_selective_recomputes_no_matrix_product_and_block_all(memory: MemoryConfig) -> None:
    batch, counts = batch_of(1, 2, 4), {}
    for mode in ("none", "selective", "block"):
        model = build(config_of(memory), compute=ComputeConfig(mode))
        with _Products() as products:
            run(model, batch).loss.backward()
        counts[mode] = products.count
    assert counts["selective"] == counts["none"] < counts["block"]


@MEMORY
def test_block_checkpointing_keeps_less_than_a_tenth(memory: MemoryConfig) -> None:
    batch, kept = batch_of(2, 4, 16), {}
    for mode in ("none", "block"):
        model, numels = build(config_of(memory), compute=ComputeConfig(mode)), []
        model.head.forward = lambda x, *_: x  # type: ignore[method-assign]  # blocks alone
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, numels=numels: numels.append(x.numel()) or x, lambda x: x
        )
        with hooks:
            model(batch.tokens, batch.starts)
        kept[mode] = sum(numels)
    assert kept["block"] < kept["none"] / 10


@MEMORY
def test_bfloat16_is_close_to_float32(memory: MemoryConfig) -> None:
    """Weights are the same numbers; activations are rounded (2^-9 each), tens in a row.

    Ways back through a latch are the worst, which sharpens differences at each segment: 0.98
    measured there.
    """
    if isinstance(memory, LandmarkMemory) and memory.retrieve:
        memory = replace(memory, retrieve=16)  # all: which blocks are best may turn with rounding
    config, batch = config_of(memory, init_std=0.1), batch_of(2, 4, 6)
    narrow = build(config, torch.bfloat16)
    wide = build(config, torch.float32)
    wide.load_state_dict({name: x.float() for name, x in narrow.state_dict().items()})
    results = []
    for model in (narrow, wide):
        output = run(model, batch)
        output.loss.backward()
        results.append((output, gradients(model)))
    (output, grads), (expected, expected_grads) = results
    assert abs(output.loss.item() / expected.loss.item() - 1) < 0.01
    assert relative(output.token_losses, expected.token_losses) < 0.01
    for name, grad in grads.items():
        assert grad.dtype == torch.bfloat16
        if not expected_grads[name].any():  # no part in this stage of training
            assert not grad.any()
            continue
        similarity = torch.cosine_similarity(grad.float().ravel(), expected_grads[name].ravel(), 0)
        assert similarity > 0.95, (name, float(similarity))


@MEMORY
def test_the_state_accumulates_in_float32_under_bfloat16(memory: MemoryConfig) -> None:
    model = build(config_of(memory), torch.bfloat16)
    for name, x in named_tensors(run(model, batch_of(1, 2, 4)).state, "").items():
        if x.is_floating_point():
            keys_of_the_past = "/window/" in name or "/store/" in name
            assert x.dtype == (torch.bfloat16 if keys_of_the_past else torch.float32), name


@pytest.mark.parametrize("memory", ALGORITHM_2.values(), ids=ALGORITHM_2.keys())
def test_the_decoder_is_algorithm_2(memory: MemoryConfig) -> None:
    """Logits and every gradient against the paper's order: block by block, dense masks."""
    batch = batch_of(2, 4, 5)
    batch.starts[1, 2] = True
    assert_twin(config_of(memory, num_layers=3), Algorithm2, batch)
