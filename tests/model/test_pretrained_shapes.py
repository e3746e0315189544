"""What published models have beside ours: biases of queries, keys and values, slower rotation."""

import math
from collections.abc import Callable

import pytest
import torch

from model.config import (
    AbcMemory,
    FamMemory,
    LandmarkMemory,
    MemoryConfig,
    NoMemory,
    RmtMemory,
    RopeScaling,
)
from model.decoder import Decoder
from model.homer import truncated
from model.init import initialise
from model.rope import rope_tables
from tests.compare import relative
from tests.model.algorithm_2 import Algorithm2
from tests.model.slow import EXACT, Slow, assert_twin
from tests.model.slow_layers import InLayers, SlowLandmark
from tests.model.slow_turns import SlowRmt
from tests.model.small import batch_of, build, config_of

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
"""Of the four frequencies of an 8-wide head one stays, one is in between, two are divided."""

TWINS: dict[str, tuple[MemoryConfig, Callable[..., Slow]]] = {
    "none": (NoMemory(), InLayers),
    "fam": (FamMemory(slots=3, window=1), Algorithm2),
    "abc": (AbcMemory(slots=3), InLayers),
    "landmark": (LandmarkMemory(block=2, window=1), SlowLandmark),
    "rmt": (RmtMemory(slots=3, window=1), SlowRmt),
}


@pytest.mark.parametrize(("memory", "twin"), TWINS.values(), ids=TWINS.keys())
def test_every_projection_has_the_bias_and_every_rotation_the_scaling(
    memory: MemoryConfig, twin: Callable[..., Slow]
) -> None:
    """Those of memory rows too: logits and every gradient against the slow twin."""
    batch = batch_of(2, 4, 6)
    batch.starts[1, 2] = True
    assert_twin(config_of(memory, qkv_bias=True, rope_scaling=LLAMA3), twin, batch)


@pytest.mark.parametrize("scaling", [LLAMA3, RopeScaling("linear", 4.0)], ids=["llama3", "linear"])
def test_scaling_changes_the_logits(scaling: RopeScaling) -> None:
    """Else the twins above would agree about nothing."""
    batch = batch_of(1, 1, 6)
    plain, scaled = (
        build(config_of(NoMemory(), rope_scaling=s))(batch.tokens, batch.starts)[0]
        for s in (RopeScaling(), scaling)
    )
    assert relative(scaled, plain) > 1e-3


def test_linear_scaling_turns_each_position_as_one_nearer() -> None:
    far, near = torch.tensor([12]), torch.tensor([3])
    like = torch.zeros(1, dtype=torch.float64)
    scaled = rope_tables(far, 8, 100.0, like, RopeScaling("linear", 4.0))
    assert torch.allclose(torch.cat(scaled), torch.cat(rope_tables(near, 8, 100.0, like)))


def test_llama3_scaling_leaves_quick_pairs_and_divides_slow_ones() -> None:
    like, first = torch.zeros(1, dtype=torch.float64), torch.tensor([1])
    cos, sin = rope_tables(first, 8, 10_000.0, like, LLAMA3)
    quick, between, slow, slowest = torch.atan2(sin, cos)[0].tolist()
    assert math.isclose(quick, 1.0)  # 64 / (2 pi): 10 turns in original_len
    assert 0.1 / 8 < between < 0.1  # 1.02 turns: 0.7 % of the way from one to four
    assert math.isclose(between, 0.1 / 8 + (6.4 / (2 * math.pi) - 1) / 3 * (0.1 - 0.1 / 8))
    assert math.isclose(slow, 0.01 / 8) and math.isclose(slowest, 0.001 / 8)


def test_a_cache_of_chosen_keys_has_bias_and_scaling_too() -> None:
    model = build(config_of(NoMemory(), qkv_bias=True, rope_scaling=LLAMA3))
    tokens, nothing = batch_of(1, 1, 8).tokens.flatten(), torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        compact = truncated(model, nothing, tokens, nothing, chunk_len=8, segment_len=16)
        logits, _ = model(tokens.view(1, 1, 8), torch.ones(1, 1, dtype=torch.bool))
    assert relative(compact.logits, logits[0, 0, -1]) < EXACT


def test_biases_start_at_zero() -> None:
    config = config_of(AbcMemory(slots=3), qkv_bias=True)
    model = Decoder(config)
    initialise(model, config, seed=0)
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    assert len(biases) == config.num_layers
    assert all(not bias.any() for bias in biases)
