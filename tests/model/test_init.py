"""Initial weights and the count of parameters."""

import math
from typing import Any

import pytest
import torch

from model.config import FamMemory, MemoryConfig, ModelConfig, NoMemory, WindowMemory
from model.decoder import Decoder
from model.init import count_parameters, initial_value, initialise
from tests.model.memories import FAM, MEMORIES
from tests.model.small import config_of

CPU = torch.device("cpu")


def weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(torch.seed())  # the global generator is to have no say
    model = Decoder(config)
    initialise(model, config, seed)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_weights_are_a_function_of_the_seed() -> None:
    config = config_of(FamMemory(slots=3))
    one, again, other = (weights(config, seed) for seed in (0, 0, 1))
    for name, value in one.items():
        assert torch.equal(value, again[name])
        assert value.dim() == 1 or not torch.equal(value, other[name])


def test_a_weight_is_a_function_of_its_name_not_of_the_others() -> None:
    """A second memory, or one more layer's siblings, changes no weight of the first layer."""
    with_slots = weights(config_of(FamMemory(slots=3)), 0)
    without = weights(config_of(NoMemory()), 0)
    assert all(torch.equal(value, with_slots[name]) for name, value in without.items())
    shape = torch.Size((8, 8))
    a, b = (initial_value(n, shape, config_of(NoMemory()), 0, CPU) for n in ("x", "y"))
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "residual"),
    [
        ("embedding.weight", False),
        ("head.output.weight", False),
        ("memory.parts.fam.prompt", False),
        ("blocks.1.qkv.linear.weight", False),
        ("blocks.1.ffn.gate_up.weight", False),
        ("blocks.1.output.weight", True),
        ("blocks.1.ffn.down.weight", True),
    ],
)
def test_maps_onto_the_residual_stream_start_smaller(name: str, residual: bool) -> None:
    config = config_of(FamMemory(slots=4096), num_layers=8, hidden_size=64, ffn_size=512)
    value = weights(config, 0)[name]
    std = config.init_std / (math.sqrt(2 * 8) if residual else 1)
    assert abs(value.std().item() / std - 1) < 5 / math.sqrt(2 * value.numel())
    assert abs(value.mean().item()) < 5 * std / math.sqrt(value.numel())


def test_norms_and_gains_start_at_one() -> None:
    vectors = {
        name: value
        for name, value in weights(config_of(FamMemory(slots=3)), 0).items()
        if value.dim() == 1
    }
    assert "blocks.0.mixer.parts.fam.carry.gain" in vectors
    assert all(torch.equal(value, torch.ones(16)) for value in vectors.values())


def real_count(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Decoder(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.hidden_size
    matrices = 1 if config.tie_embeddings else 2
    return sum(p.numel() for p in model.parameters()) - matrices * padding


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"num_kv_heads": 1}, {"qkv_bias": True}]
)
def test_the_count_is_the_real_models(memory: MemoryConfig, changes: dict[str, Any]) -> None:
    config = config_of(memory, **changes)
    assert config.padded_vocab_size > config.vocab_size
    assert count_parameters(config) == real_count(config)


def llama_3_8b(memory: MemoryConfig) -> ModelConfig:
    return ModelConfig(128_256, 32, 4096, 32, 8, 14_336, 128, 500_000.0, memory=memory)


@pytest.mark.parametrize("memory", [NoMemory(), WindowMemory(3)])
def test_llama_3_8b_has_8030261248_parameters(memory: MemoryConfig) -> None:
    """2 * 128256 * 4096 + 32 * (4096 * 6144 + 4096^2 + 3 * 4096 * 14336 + 2 * 4096) + 4096."""
    config = llama_3_8b(memory)
    assert count_parameters(config) == real_count(config) == 8_030_261_248


@pytest.mark.parametrize("memory", FAM.values(), ids=FAM.keys())
def test_slots_add_a_prompt_and_where_normalised_a_gain_a_layer(memory: FamMemory) -> None:
    gains = 0 if memory.state == "paper" else 32 * 4096
    expected = 8_030_261_248 + memory.slots * 4096 + gains
    assert count_parameters(llama_3_8b(memory)) == expected


def test_llama_3_8b_with_64_slots_is_the_real_models_count() -> None:
    config = llama_3_8b(FamMemory(slots=64, state="norm"))
    assert count_parameters(config) == real_count(config) == 8_030_261_248 + 96 * 4096
