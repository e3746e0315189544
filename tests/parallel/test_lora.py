"""Adapters at every layout equal one plain process: loss, norm, gradients of A and B, weights."""

import pytest
import torch

from model.config import ComputeConfig, LoraConfig
from model.lora import is_trained
from tests.parallel.cases import CLIP, Case, config_of, differences_of, reference, subject_of
from train.checking.compare import FLOORS
from train.checking.plain import begin

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


def name_of(case: Case) -> str:
    return str(case).replace(str(LORA), "all").replace(str(BESIDE), "some")


@pytest.mark.gloo
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_adapters_at_a_layout_equal_one_plain_process(case: Case) -> None:
    differences, found = differences_of(case)
    assert [each for each in differences if not each.passes] == []
    assert {each.kind for each in differences} == set(FLOORS)
    assert found.weights.keys() == reference(case).weights.keys()  # those at rest too


@pytest.mark.gloo
def test_bfloat16_adapters_are_close_to_plain_float32() -> None:
    case = Case(tensor="TP2+SP", cp=2, stage=3, bf16=True, lora=LORA)
    differences, found = differences_of(case)
    assert [each for each in differences if not each.passes] == []
    for step, plain_step in zip(found.steps, reference(case).steps, strict=True):
        assert abs(step.loss / plain_step.loss - 1) < 5e-3
        assert abs(step.grad_norm / plain_step.grad_norm - 1) < 5e-2
    frozen = [weight for name, weight in found.weights.items() if not is_trained(name, LORA)]
    assert {weight.dtype for weight in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("lora", [LORA, BESIDE], ids=["all", "some"])
def test_the_reference_trains_what_it_should_and_nothing_else(lora: LoraConfig) -> None:
    """Else frozen weights that move, or adapters that rest, would be equal too."""
    case = Case(lora=lora)
    steps, weights = reference(case)
    model = begin(subject_of(case).config, config_of(case), torch.float64)
    for name, began in model.named_parameters():
        assert torch.equal(weights[name], began) != is_trained(name, lora), name
    assert all(gradient.any() for step in steps for gradient in step.gradients.values())
    assert all(step.grad_norm > 2 * CLIP for step in steps)
