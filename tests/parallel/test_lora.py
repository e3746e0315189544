"""Adapters at every layout equal one plain process: loss, norm, gradients of A and B, weights."""

import functools
from typing import Any

import pytest
import torch

from model.config import ComputeConfig, LoraConfig
from model.decoder import Decoder
from model.init import initialise
from model.lora import is_trained
from tests.compare import assert_each
from tests.parallel import layouts, plain
from tests.parallel.plain import CLIP, Case, Step, config_of
from tests.parallel.test_equivalence import GRADIENTS, LOSSES, WEIGHTS

LORA = LoraConfig(rank=3, alpha=6.0)
BESIDE = LoraConfig(rank=3, alpha=6.0, targets=("qkv", "down"), train_also=("norms", "embeddings"))

CASES = [
    Case(tensor="TP2+SP", cp=2, stage=3, lora=LORA, compute=ComputeConfig("block", 32, 24)),
    Case(tensor="TP2+SP", cp=2, stage=1, lora=BESIDE, compute=ComputeConfig("selective", 32, 24)),
    Case(tensor="TP2", stage=2, lora=LORA),
    Case(tensor="TP2+SP", stage=3, lora=BESIDE, memory="rmt"),
    Case(dp=2, stage=3, lora=LORA, memory="none"),
    Case(dp=2, stage=2, lora=LORA, memory="composed", windows=2, micro_batches=2),
    Case(tensor="TP2", dp=2, stage=1, lora=BESIDE, tied=True),
]


@functools.cache
def reference(
    memory: str, windows: int, tied: bool, lora: LoraConfig
) -> tuple[list[Step], dict[str, Any]]:
    return plain.train(Case(memory=memory, windows=windows, tied=tied, lora=lora))


def name_of(case: Case) -> str:
    return str(case).replace(str(LORA), "all").replace(str(BESIDE), "some")


@pytest.mark.gloo
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_adapters_at_a_layout_equal_one_plain_process(case: Case) -> None:
    assert case.lora is not None
    expected, expected_weights = reference(case.memory, case.windows, case.tied, case.lora)
    steps, weights = layouts.run(case)
    for step, plain_step in zip(steps, expected, strict=True):
        assert abs(step.loss / plain_step.loss - 1) < LOSSES
        assert abs(step.grad_norm / plain_step.grad_norm - 1) < LOSSES * 2
        assert_each(step.gradients, plain_step.gradients, GRADIENTS)
    assert_each(weights, expected_weights, WEIGHTS)


@pytest.mark.gloo
def test_bfloat16_adapters_are_close_to_plain_float32() -> None:
    expected, _ = reference("fam", 1, False, LORA)
    steps, weights = layouts.run(Case(tensor="TP2+SP", cp=2, stage=3, bf16=True, lora=LORA))
    for step, plain_step in zip(steps, expected, strict=True):
        assert abs(step.loss / plain_step.loss - 1) < 5e-3
        assert abs(step.grad_norm / plain_step.grad_norm - 1) < 5e-2
    frozen = {name: weight for name, weight in weights.items() if not is_trained(name, LORA)}
    assert {weight.dtype for weight in frozen.values()} == {torch.bfloat16}


@pytest.mark.parametrize("lora", [LORA, BESIDE], ids=["all", "some"])
def test_the_reference_trains_what_it_should_and_nothing_else(lora: LoraConfig) -> None:
    """Else frozen weights that move, or adapters that rest, would be equal too."""
    steps, weights = reference("fam", 1, False, lora)
    config = config_of(Case(lora=lora))
    model = Decoder(config)
    plain.unmark_adapters(model)
    initialise(model, config, seed=0)
    for name, began in model.named_parameters():
        assert torch.equal(weights[name], began) != is_trained(name, lora), name
    assert all(gradient.any() for step in steps for gradient in step.gradients.values())
    assert all(step.grad_norm > 2 * CLIP for step in steps)
