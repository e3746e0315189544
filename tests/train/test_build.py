"""From a configuration to a model: every field arrives, weights are those of no layout."""

from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model import memory as memories
from model.config import (
    AbcMemory,
    ArmtMemory,
    CmabMemory,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    LandmarkMemory,
    LoraConfig,
    ModelConfig,
    NoMemory,
    RmtMemory,
    RopeScaling,
    WindowMemory,
    compose,
)
from model.decoder import Decoder
from model.init import initialise
from model.lora import is_trained
from parallel.mesh import build_mesh
from parallel.tensor import cut_of
from tests.ranks import run_ranks
from tests.train.runs import small
from tests.train.tiny import FAM, Shards, build_tiny, tiny_config
from train.build import build, make_optimizer, to_compute_config, to_model_config
from train.settings.config import Config, validate
from train.settings.memories import IN_TURN, MEMORY_CONFIGS, Named

UNUSUAL: dict[str, Any] = {
    "vocab_size": 999,
    "num_layers": 3,
    "hidden_size": 48,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 10,
    "ffn_size": 88,
    "rope_base": 777.0,
    "rope_scaling": {
        "type": "llama3",
        "factor": 3.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 5.0,
        "original_len": 77,
    },
    "qkv_bias": True,
    "norm_eps": 1e-3,
    "tie_embeddings": True,
    "init_std": 0.5,
}
MODEL = UNUSUAL | {"rope_scaling": RopeScaling(**UNUSUAL["rope_scaling"])}
MEMORIES: dict[str, tuple[dict[str, Any], object]] = {
    "none": ({"name": "none"}, NoMemory()),
    "window": ({"name": "window", "segments": 3}, WindowMemory(segments=3)),
    "fam": (
        {
            "name": "fam",
            "slots": 5,
            "window": 2,
            "state": "latch",
            "beta": 3.5,
            "query_position": "previous",
            "first": "hidden",
            "random_state_passing": 0.25,
        },
        FamMemory(
            slots=5,
            window=2,
            state="latch",
            beta=3.5,
            query_position="previous",
            first="hidden",
        ),
    ),
    "infini": (
        {"name": "infini", "rule": "delta", "gate_init": -0.5, "gate_lr": 3, "window": 2},
        InfiniMemory(rule="delta", gate_init=-0.5, gate_lr=3.0, window=2),
    ),
    "abc": ({"name": "abc", "slots": 5, "window": 2}, AbcMemory(slots=5, window=2)),
    "cmab": ({"name": "cmab", "latents": 5, "window": 2}, CmabMemory(latents=5, window=2)),
    "rmt": (
        {
            "name": "rmt",
            "slots": 5,
            "mask": "causal",
            "state": "latch",
            "beta": 3.5,
            "offset": True,
            "window": 2,
        },
        RmtMemory(slots=5, mask="causal", state="latch", beta=3.5, offset=True, window=2),
    ),
    "armt": (
        {"name": "armt", "slots": 5, "key_dim": 7, "window": 2},
        ArmtMemory(slots=5, key_dim=7, window=2),
    ),
    "hmt": (
        {
            "name": "hmt",
            "bank": 9,
            "sensory": 5,
            "search_dim": 7,
            "search_from": 3,
            "window": 2,
        },
        HmtMemory(bank=9, sensory=5, search_dim=7, search_from=3, window=2),
    ),
    "landmark": (
        {
            "name": "landmark",
            "block": 16,
            "window": 2,
            "retrieve": 3,
            "granularity": "heads",
            "layers": "last",
        },
        LandmarkMemory(block=16, window=2, retrieve=3, granularity="heads", layers="last"),
    ),
}


def test_every_memory_is_tried_here() -> None:
    sections = [get_args(kind.model_fields["name"].annotation)[0] for kind in get_args(Named)]
    assert list(MEMORIES) == sections == list(MEMORY_CONFIGS)
    assert {kind().name for kind in MEMORY_CONFIGS.values()} == MEMORIES.keys()


def test_a_list_is_composed() -> None:
    raw = [{"name": "window", "segments": 2}, MEMORIES["abc"][0] | {"window": 0}, "infini"]
    config = validate(small(model={**UNUSUAL, "memory": raw}))
    expected = compose([WindowMemory(2), AbcMemory(slots=5), InfiniMemory()])
    assert to_model_config(config, vocab_size=5).memory == expected


def test_the_memories_in_turn_are_known() -> None:
    assert {name for name, kind in memories.MEMORIES.items() if kind.in_turn} == set(IN_TURN)


@pytest.mark.parametrize("name", MEMORIES)
def test_every_field_arrives(name: str) -> None:
    raw, memory = MEMORIES[name]
    config = validate(small(model={**UNUSUAL, "memory": raw}))
    found = to_model_config(config, vocab_size=5)
    assert found == ModelConfig(**MODEL, memory=memory)


def test_no_field_of_the_model_is_left_to_its_default() -> None:
    assert UNUSUAL.keys() == {field.name for field in fields(ModelConfig)} - {"memory", "lora"}


def test_adapters_arrive() -> None:
    raw = {"rank": 3, "alpha": 5, "targets": ["down", "qkv"], "train_also": ["norms"]}
    config = validate(small(model__lora=raw, model__init_from="runs/base"))
    expected = LoraConfig(3, 5.0, targets=("qkv", "down"), train_also=("norms",))
    assert to_model_config(config, vocab_size=5).lora == expected
    assert {field.name for field in fields(LoraConfig)} == raw.keys()
    assert to_model_config(validate(small()), vocab_size=5).lora is None


def test_only_what_learns_has_optimizer_state() -> None:
    raw = {"rank": 3, "train_also": ["norms"]}
    config = validate(small(model__lora=raw, model__init_from="runs/base", model__memory=FAM))
    model_config = to_model_config(config, 257)
    model = Decoder(model_config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, config).param_groups
    found = {names[id(p)] for group in groups for p in group["params"]}
    assert found == {name for name in names.values() if is_trained(name, model_config.lora)}


@pytest.mark.parametrize("name", MEMORIES)
def test_no_field_of_a_memory_is_left_to_its_default(name: str) -> None:
    raw, memory = MEMORIES[name]
    default = type(memory)()
    same = [
        field.name
        for field in fields(memory)  # type: ignore[arg-type]
        if getattr(memory, field.name) == getattr(default, field.name)
    ]
    assert same == ["name"]


def test_what_is_left_out_follows_from_the_rest() -> None:
    found = to_model_config(validate(small()), vocab_size=257)
    assert (found.vocab_size, found.head_dim) == (257, 64 // 4)


def test_what_is_recomputed_arrives() -> None:
    changes = {"train__checkpointing": "block", "train__loss_chunk": 7, "train__ffn_chunk": 9}
    compute = to_compute_config(validate(small(**changes)))
    assert (compute.checkpointing, compute.loss_chunk, compute.ffn_chunk) == ("block", 7, 9)


def plain(config: Config) -> Decoder:
    model_config = to_model_config(config, 257)
    model = Decoder(model_config)
    initialise(model, model_config, config.seed)
    return model


def test_matrices_decay_norms_and_gains_do_not() -> None:
    config = validate(small(train__weight_decay=0.25, model__memory=FAM))
    model = plain(config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in make_optimizer(model, config).param_groups
    }
    assert groups.keys() == {0.25, 0.0}
    vectors = {name for name in names.values() if "norm" in name or name.endswith("gain")}
    assert groups[0.0] == vectors
    assert groups[0.25] == set(names.values()) - vectors
    assert (
        "embedding.weight" in groups[0.25] and "blocks.0.mixer.parts.fam.carry.gain" in groups[0.0]
    )


def test_the_gates_have_a_rate_of_their_own_and_no_decay() -> None:
    memory = {"name": "infini", "gate_lr": 7}
    config = validate(small(train__weight_decay=0.25, model__memory=memory))
    model = plain(config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        (group["weight_decay"], group["lr_scale"]): {names[id(p)] for p in group["params"]}
        for group in make_optimizer(model, config).param_groups
    }
    assert groups.keys() == {(0.25, 1.0), (0.0, 1.0), (0.0, 7.0)}
    assert groups[0.0, 7.0] == {f"blocks.{i}.mixer.parts.infini.gate" for i in range(2)}


def test_the_optimizer_has_the_settings_asked_for() -> None:
    changes = {"train__beta1": 0.8, "train__beta2": 0.7, "train__eps": 1e-3, "train__lr": 0.2}
    config = validate(small(**changes))
    for group in make_optimizer(plain(config), config).param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.7), 1e-3, 0.2)


def whole_weights(config: Config) -> dict[str, Tensor]:
    """Return every initial weight, joined over the tensor-parallel ranks."""
    built, mesh, _ = build_tiny(config)
    joined = {}
    for name, parameter in built.model.named_parameters():
        parts = [torch.empty_like(parameter.data) for _ in range(mesh.tp)]
        dist.all_gather(parts, parameter.data.contiguous(), group=mesh.tp_group)
        joined[name] = cut_of(parameter).join(parts)
    return joined


@pytest.mark.gloo
@pytest.mark.parametrize("scattered", [True, False])
def test_initial_weights_are_the_same_for_tp_1_and_2(scattered: bool, shards: Shards) -> None:
    config = tiny_config(shards, parallel__tp=2, parallel__sequence_parallel=scattered)
    expected = dict(plain(config).named_parameters())
    for found in run_ranks(2, whole_weights, config):
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.gloo
def test_another_seed_gives_other_weights(shards: Shards) -> None:
    one, other = (plain(tiny_config(shards, seed=seed)) for seed in (0, 1))
    for (name, weight), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert weight.dim() == 1 or not torch.equal(weight, theirs), name


def layout_of(config: Config) -> list[str]:
    mesh = build_mesh(tp=config.parallel.tp, cp=config.parallel.cp)
    built = build(config, to_model_config(config, 257), mesh)
    sequence: Any = built.model.sequence
    parts = (built.layout, sequence.layout, sequence.exchange)
    return [type(part).__name__ for part in parts]


@pytest.mark.gloo
@pytest.mark.parametrize("attention", ["ring", "all_gather"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_the_layout_and_the_exchange_are_those_asked_for(
    layout: str, attention: str, shards: Shards
) -> None:
    changes = {"parallel__layout": layout, "parallel__attention": attention}
    config = tiny_config(shards, parallel__cp=2, **changes)
    names = run_ranks(2, layout_of, config)[0]
    assert names[0] == names[1]  # the batch is cut as the model takes it
    assert layout in names[0].lower()
    assert attention.replace("_", "") in names[2].lower()
