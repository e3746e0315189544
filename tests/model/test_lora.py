"""Adapters on one device: what they add, what learns, how they merge."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import FamMemory, LoraConfig, ModelConfig, NoMemory
from model.decoder import Decoder
from model.init import count_parameters, initialise
from model.lora import is_adapter, merge_lora
from tests.model.memories import MEMORIES
from tests.model.small import config_of
from tests.model.test_init import real_count

LORA = LoraConfig(rank=3, alpha=6.0)
MAPS = {
    "qkv": "qkv.linear",
    "output": "output",
    "gate_up": "ffn.gate_up",
    "down": "ffn.down",
}


def model_of(lora: LoraConfig | None, memory: Any = None) -> Decoder:
    config = replace(config_of(memory or FamMemory(slots=4)), lora=lora)
    model = Decoder(config)
    initialise(model, config, seed=0)
    return model


def logits(model: Decoder) -> Tensor:
    tokens = torch.randint(0, 30, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    found: Tensor = model(tokens, torch.zeros(2, 3, dtype=torch.bool))[0]
    return found


def randomise(model: Decoder) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_new_adapters_change_nothing() -> None:
    assert torch.equal(logits(model_of(LORA)), logits(model_of(None)))


def test_names_of_the_models_own_weights_stay() -> None:
    own = [name for name, _ in model_of(LORA).named_parameters() if not is_adapter(name)]
    assert own == [name for name, _ in model_of(None).named_parameters()]


@pytest.mark.parametrize("target", MAPS)
def test_a_target_is_the_map_of_its_name(target: Any) -> None:
    names = dict(model_of(replace(LORA, targets=(target,))).named_parameters())
    adapters = {name for name in names if is_adapter(name)}
    assert adapters == {
        f"blocks.{i}.{MAPS[target]}.lora_{part}.weight" for i in range(2) for part in "ab"
    }
    weight, a, b = (
        names[f"blocks.0.{MAPS[target]}.{part}"].shape
        for part in ("weight", "lora_a.weight", "lora_b.weight")
    )
    assert (a, b) == ((3, weight[1]), (weight[0], 3))


def test_a_begins_normal_with_variance_a_third_of_1_over_inputs_and_b_at_0() -> None:
    config = ModelConfig(64, 1, 256, 4, 4, 256, 64, lora=LoraConfig(rank=64))
    model = Decoder(config)
    initialise(model, config, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_a.weight"):
            assert parameter.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.02)
        if name.endswith("lora_b.weight"):
            assert not parameter.any()


@pytest.mark.parametrize("memory", [NoMemory(), FamMemory(slots=4)], ids=["none", "fam"])
def test_merged_weights_compute_what_adapters_do(memory: Any) -> None:
    adapted, plain = model_of(LORA, memory), model_of(None, memory)
    randomise(adapted)
    weights = {name: parameter.detach() for name, parameter in adapted.named_parameters()}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(merge_lora(name, weights, LORA.alpha))
    expected = logits(adapted)
    assert (logits(plain) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (logits(model_of(None, memory)) - expected).abs().max() > 0.01 * expected.abs().max()


def test_what_learns_follows_the_configuration() -> None:
    def learning(lora: LoraConfig) -> set[str]:
        return {name for name, p in model_of(lora).named_parameters() if p.requires_grad}

    own = {"memory.parts.fam.prompt"} | {f"blocks.{i}.mixer.parts.fam.carry.gain" for i in (0, 1)}
    adapters = {n for n, _ in model_of(LORA).named_parameters() if is_adapter(n)}
    assert learning(LORA) == own | adapters
    norms = {f"blocks.{i}.{part}_norm.weight" for i in (0, 1) for part in ("attention", "ffn")}
    assert learning(replace(LORA, train_also=("norms",))) - learning(LORA) == norms | {
        "head.norm.weight"
    }
    assert learning(replace(LORA, train_also=("embeddings",))) - learning(LORA) == {
        "embedding.weight",
        "head.output.weight",
    }


@pytest.mark.parametrize("also", [(), ("embeddings",)], ids=["frozen head", "head learns"])
def test_a_frozen_head_has_no_gradient_and_others_the_same_as_without_freezing(also: Any) -> None:
    model, free = model_of(replace(LORA, train_also=also)), model_of(LORA)
    randomise(model), randomise(free)
    free.requires_grad_(True)
    for one in (model, free):
        tokens = torch.randint(0, 30, (1, 2, 8), generator=torch.Generator().manual_seed(0))
        starts = torch.zeros(1, 2, dtype=torch.bool)
        one(tokens, starts, labels=tokens, scale=torch.tensor(0.1)).loss.backward()
    expected = dict(free.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name].grad), name


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_the_count_is_the_real_models(memory: Any) -> None:
    config = replace(config_of(memory), lora=replace(LORA, targets=("qkv", "gate_up", "output")))
    assert count_parameters(config) == real_count(config)
