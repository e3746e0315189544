"""Diagonals of (layer, segment) against segments that go through the stack one by one."""

from typing import Any

import pytest
import torch

from model.config import (
    ArmtMemory,
    ComputeConfig,
    LoraConfig,
    MemoryConfig,
    RmtMemory,
    WindowMemory,
)
from tests.compare import assert_each, relative
from tests.model.slow import EXACT
from tests.model.small import batch_of, build, config_of, gradients

WAVE = ComputeConfig(wavefront=True)


def trained(compute: ComputeConfig, count: int, **changes: Any) -> dict[str, torch.Tensor]:
    """Return loss, gradients and the state after two calls, the second from the first's state."""
    window = changes.pop("window", 0)
    config = config_of(ArmtMemory(slots=3, key_dim=4, window=window), **changes)
    model, batch = build(config, compute=compute), batch_of(2, count + 2, 6)
    batch.starts[1, 1] = batch.starts[0, count] = True
    first, second = batch.segments(0, 2), batch.segments(2, count + 2)
    state = model(first.tokens, first.starts, labels=first.labels, scale=first.scale).state
    output = model(second.tokens, second.starts, state, labels=second.labels, scale=second.scale)
    output.loss.backward()
    found = gradients(model) | {"loss": output.loss, "losses": output.token_losses}
    for i, layer in enumerate(output.state.layers):
        found[f"matrix {i}"] = layer.parts["armt"].matrix
        found[f"keys {i}"], found[f"age {i}"] = layer.window.k, layer.window.age.double()
    return found


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize(("count", "depth"), [(2, 4), (4, 4), (7, 3), (5, 1), (1, 3)])
def test_diagonals_equal_segments_in_turn(count: int, depth: int, window: int) -> None:
    """Fewer segments than layers, as many, more; gradients through the state of an earlier call."""
    plain = trained(ComputeConfig(), count, num_layers=depth, window=window)
    assert_each(trained(WAVE, count, num_layers=depth, window=window), plain, EXACT)


@pytest.mark.parametrize(
    "compute",
    [
        ComputeConfig("selective", wavefront=True),
        ComputeConfig("block", loss_chunk=5, wavefront=True),
    ],
    ids=lambda c: c.checkpointing,
)
def test_recomputation_meets_the_same_layers(compute: ComputeConfig) -> None:
    plain = trained(ComputeConfig(), 5, num_layers=3, qkv_bias=True)
    assert_each(trained(compute, 5, num_layers=3, qkv_bias=True), plain, EXACT)


def test_calls_grow_with_segments_and_layers_not_with_their_product() -> None:
    calls = []
    for compute in (ComputeConfig(), WAVE):
        model = build(config_of(ArmtMemory(slots=3, key_dim=4), num_layers=4), compute=compute)
        run = model._run
        seen: list[int] = []
        model._run = lambda block, x, *rest, run=run, seen=seen: (  # type: ignore[method-assign]
            seen.append(len(x)) or run(block, x, *rest)
        )
        batch = batch_of(2, 6, 5)
        model(batch.tokens, batch.starts)
        calls.append(seen)
    in_turn, diagonal = calls
    assert in_turn == [2 * 5] * 6 * 4
    assert [rows // 10 for rows in diagonal] == [1, 2, 3, 4, 4, 4, 3, 2, 1]


def test_what_a_tool_has_hung_on_a_layer_is_not_taken_for_all() -> None:
    config, batch = config_of(ArmtMemory(slots=3, key_dim=4), num_layers=3), batch_of(2, 5, 6)
    plain, wave = build(config), build(config, compute=WAVE)
    called: list[torch.nn.Module] = []
    for module in wave.blocks.modules():
        module.forward = module.forward
    for block in wave.blocks:
        block.register_forward_hook(lambda block, *rest: called.append(block))
    with torch.no_grad():
        expected, _ = plain(batch.tokens, batch.starts)
        logits, _ = wave(batch.tokens, batch.starts)
    assert relative(logits, expected) < EXACT
    assert not called


def test_streaming_reads_what_training_does() -> None:
    config = config_of(ArmtMemory(slots=3, key_dim=4), num_layers=3)
    batch = batch_of(2, 5, 6)
    plain, wave = build(config), build(config, compute=WAVE)
    with torch.no_grad():
        expected, _ = plain(batch.tokens, batch.starts)
        state = wave.read(batch.tokens[:, :3], batch.starts[:, :3])
        logits, _ = wave(batch.tokens[:, 3:], batch.starts[:, 3:], state)
    assert relative(logits, expected[:, 3:]) < EXACT


@pytest.mark.parametrize("memory", [WindowMemory(1), RmtMemory(slots=3)])
def test_other_memories_are_refused(memory: MemoryConfig) -> None:
    with pytest.raises(ValueError, match=f"wavefront is for armt.*this is {memory.name}"):
        build(config_of(memory), compute=WAVE)


def test_chunks_of_rows_are_refused() -> None:
    """They would cut across layers, and where sizes fit by chance give wrong numbers."""
    with pytest.raises(ValueError, match="ffn_chunk=8 would cut across them"):
        build(
            config_of(ArmtMemory(slots=3, key_dim=4)),
            compute=ComputeConfig(ffn_chunk=8, wavefront=True),
        )


def test_adapters_are_refused() -> None:
    lora = LoraConfig(rank=2, alpha=4.0, targets=("qkv",))
    model = build(config_of(ArmtMemory(slots=3, key_dim=4), lora=lora), compute=WAVE)
    batch = batch_of(1, 2, 4)
    with pytest.raises(ValueError, match="stacks plain linear maps and norms only"):
        model(batch.tokens, batch.starts)
