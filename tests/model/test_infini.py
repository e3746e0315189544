"""Infini-attention against the paper's sequential equations, and what only it does."""

import pytest
import torch

from model.config import InfiniMemory, MemoryConfig, NoMemory, WindowMemory
from model.init import initialise
from model.memory.base import named_tensors
from model.memory.infini import InfiniPart, InfiniState
from tests.compare import relative
from tests.model.slow import EXACT, assert_twin
from tests.model.slow_layers import InLayers
from tests.model.small import VOCAB, batch_of, build, config_of

RULES = pytest.mark.parametrize("rule", ["linear", "delta"])


@RULES
@pytest.mark.parametrize("window", [0, 1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_is_the_papers_equations(rule: str, window: int, kv_heads: int) -> None:
    """Logits and every gradient; documents begin in the middle; nothing is written at first."""
    batch = batch_of(2, 5, 6)
    batch.starts[0, 4] = batch.starts[1, 2] = True
    memory = InfiniMemory(rule, gate_init=0.5, window=window)
    assert_twin(config_of(memory, num_kv_heads=kv_heads), InLayers, batch)


def test_a_weight_of_log_c_writes_a_segment_c_times() -> None:
    batch = batch_of(2, 5, 4)
    batch.starts[1, 2] = True
    counts = torch.tensor([[1, 3, 2, 5, 1], [4, 1, 7, 2, 2]])
    assert_twin(config_of(InfiniMemory()), InLayers, batch, counts=counts)


def test_the_delta_rule_takes_no_weights() -> None:
    """Its second write of a segment meets what the first left."""
    model, batch = build(config_of(InfiniMemory("delta"))), batch_of(1, 2, 4)
    with pytest.raises(ValueError, match="infini has no such count"):
        model(batch.tokens, batch.starts, weights=torch.zeros(1, 2))


@pytest.mark.parametrize("window", [0, 2])
@RULES
def test_a_gate_of_minus_30_is_no_memory(rule: str, window: int) -> None:
    """sigmoid(-30) = 1e-13."""
    plain: MemoryConfig = WindowMemory(window) if window else NoMemory()
    model, without = (build(config_of(m)) for m in (InfiniMemory(rule, window=window), plain))
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.parts["infini"].gate.fill_(-30.0)
    missing, unexpected = without.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.endswith("infini.gate") for name in unexpected)
    batch = batch_of(2, 4, 6)
    logits = [m(batch.tokens, batch.starts)[0][..., :VOCAB] for m in (model, without)]
    assert relative(*logits) < EXACT


def test_an_empty_memory_reads_as_0_and_the_gate_applies() -> None:
    model = build(config_of(InfiniMemory()))
    part = model.blocks[0].mixer.parts["infini"]
    assert isinstance(part, InfiniPart)
    q, attended = (torch.randn(2, 1, 3, 4, 8, dtype=torch.float64) for _ in range(2))
    nothing = InfiniState(q.new_zeros(2, 1, 2, 8, 8), q.new_zeros(2, 1, 2, 8))
    local = (1 - torch.sigmoid(part.gate)).unsqueeze(-1)
    assert relative(part.blend(q, nothing, attended), local * attended) < EXACT


@pytest.mark.parametrize("gate_init", [0.0, -1.5])
def test_gates_start_where_the_configuration_says_with_a_rate_of_their_own(
    gate_init: float,
) -> None:
    config = config_of(InfiniMemory(gate_init=gate_init, gate_lr=25.0))
    model = build(config)
    initialise(model, config, seed=3)
    for block in model.blocks:
        gate = block.mixer.parts["infini"].gate
        assert gate.shape == (config.num_heads,)
        assert torch.equal(gate, torch.full_like(gate, gate_init))
        assert gate.lr_scale == 25.0


@RULES
def test_256_segments_under_bfloat16_add_up_in_float32(rule: str) -> None:
    """In bfloat16 1 added to 256 is lost: the norm, a sum of positive keys, would stand still."""
    config, batch = config_of(InfiniMemory(rule), init_std=0.1), batch_of(1, 256, 4)
    narrow, wide = build(config, torch.bfloat16), build(config, torch.float64)
    wide.load_state_dict({name: x.double() for name, x in narrow.state_dict().items()})
    with torch.no_grad():
        logits, state = narrow(batch.tokens, batch.starts)
        _, expected = wide(batch.tokens, batch.starts)
    assert logits.isfinite().all()
    found, exact = (named_tensors([x.parts for x in s.layers], "") for s in (state, expected))
    for name, x in found.items():
        assert x.dtype == torch.float32
        # The inputs are rounded to 2^-9; values have both signs, so their sums cancel.
        assert relative(x, exact[name]) < (0.01 if name.endswith("norm") else 0.05), name
        assert exact[name].abs().max() > 100
