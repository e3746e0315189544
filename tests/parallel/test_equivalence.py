"""Contract 1: every layout equals one plain process.

Loss, gradient norm and every parameter's gradient at each of three optimizer steps, and the weights
after them; with memory carried from step to step, a document that ends inside, ignored labels, and
clipping that binds.
"""

import subprocess
import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ComputeConfig, LoraConfig
from tests.parallel.cases import (
    CLIP,
    MEMORIES,
    Case,
    config_of,
    differences_of,
    reference,
    subject_of,
)
from tests.parallel.covering import covering, pairs_of
from train.checking import plain
from train.checking.compare import FLOORS
from train.settings.memories import MEMORY_CONFIGS

VALUES: dict[str, list[Any]] = {
    "memory": ["fam", "window", "none", "infini", "infini-delta", "abc", "cmab", "composed"]
    + ["landmark", "rmt", "armt", "hmt"],
    "tensor": ["TP1", "TP2", "TP2+SP"],
    "cp": [1, 2, 4],
    "exchange": ["ring", "all_gather"],
    "layout": ["zigzag", "contiguous"],
    "stage": [1, 2, 3],
}


def candidates() -> list[dict[str, Any]]:
    """Every combination; without CP there is neither exchange nor layout (None)."""
    found = [dict(zip(VALUES, chosen, strict=True)) for chosen in product(*VALUES.values())]
    alone = {"exchange": None, "layout": None}
    found = [c | alone if c["cp"] == 1 else c for c in found]
    # hmt summarises a segment's first half, which contiguous slices do not share evenly
    return [c for c in found if (c["memory"], c["layout"]) != ("hmt", "contiguous")]


def case_of(combination: dict[str, Any]) -> Case:
    """Without CP two data-parallel ranks, so that ZeRO always cuts something."""
    given = {name: value for name, value in combination.items() if value is not None}
    return Case(**given, dp=2 if given["cp"] == 1 else 1)


def is_large(combination: dict[str, Any]) -> bool:
    return case_of(combination).ranks > 4


COVERING = covering(candidates(), is_large)

PAIRWISE = [case_of(combination) for combination in COVERING]

OTHERS = [
    Case(dp=2, cp=2, stage=3),
    Case(dp=2, cp=2, memory="window", exchange="all_gather", stage=2),
    Case(),
    Case(tensor="TP2+SP", stage=3),
    Case(cp=2, windows=2, stage=2),
    Case(cp=2, windows=2, stage=3, memory="window"),
    Case(dp=2, micro_batches=2, stage=1),
    Case(dp=2, micro_batches=2, stage=3),
    Case(cp=2, windows=2, micro_batches=2, stage=2),
    Case(tensor="TP2+SP", cp=2, stage=3, compute=ComputeConfig("block", 32, 24)),
    Case(tensor="TP2+SP", cp=2, stage=3, compute=ComputeConfig("selective", 32, 24)),
    Case(tensor="TP2+SP", cp=2, stage=3, memory="fam", compute=ComputeConfig("selective")),
    Case(tensor="TP2+SP", cp=2, stage=3, tied=True),
    Case(tensor="TP2", dp=2, stage=2, tied=True),
    Case(tensor="TP2+SP", dp=2, stage=2, memory="composed", bias=True),
    Case(tensor="TP2", cp=2, stage=3, memory="rmt", bias=True),
    Case(tensor="TP2+SP", cp=2, stage=2, memory="fam-hidden"),
    Case(tensor="TP2+SP", cp=2, stage=2, memory="rmt-causal"),
    Case(cp=2, memory="hmt-stage-1", stage=3),
    Case(cp=2, windows=2, memory="landmark-last", stage=2),
    Case(tensor="TP2+SP", windows=2, memory="landmark-retrieve", stage=3),
    Case(cp=2, windows=2, memory="rmt"),
    Case(cp=2, windows=4, memory="rmt", stage=2),
    Case(dp=2, windows=4, memory="armt", stage=3),
    Case(cp=2, memory="armt", stage=2, compute=ComputeConfig("block", wavefront=True)),
    Case(dp=2, windows=2, memory="armt", compute=ComputeConfig("selective", wavefront=True)),
    Case(cp=2, windows=2, memory="infini-delta", stage=2),
    Case(tensor="TP2+SP", cp=2, memory="hmt", stage=3, compute=ComputeConfig("block", 32)),
    Case(tensor="TP2+SP", cp=2, memory="hmt", stage=2, compute=ComputeConfig("block", 32, 24)),
    Case(tensor="TP2+SP", cp=2, memory="armt", compute=ComputeConfig("selective", 32, 24)),
    Case(tensor="TP2", cp=2, memory="composed", stage=3, compute=ComputeConfig("block")),
]

PACKED = [
    Case(packed=True, cp=4, memory="fam", stage=2),
    Case(packed=True, cp=4, memory="infini", exchange="all_gather", layout="contiguous"),
    Case(packed=True, cp=2, memory="composed", windows=2, stage=3, layout="contiguous"),
    Case(packed=True, tensor="TP2+SP", cp=2, memory="fam", stage=3),
    Case(packed=True, tensor="TP2+SP", cp=2, memory="composed", compute=ComputeConfig("block")),
    Case(packed=True, dp=2, memory="cmab", stage=3, micro_batches=2),
    Case(packed=True, dp=2, cp=2, memory="window", stage=3, exchange="all_gather"),
]

ROUNDING = 8
"""Times contract 1, at most, that rounding is granted where one process has it too (5 for infini's
gates, 1 to 2 for most)."""


def marked(cases: list[Case]) -> list[Any]:
    """Those of 8 ranks, and every second of the cover's four-rank ones, are left to `slow`."""
    dear = [case for case in PAIRWISE if case.ranks == 4][::2]
    return [
        pytest.param(
            case,
            id=str(case),
            marks=[pytest.mark.slow] if case.ranks > 4 or case in dear else [],
        )
        for case in cases
    ]


def test_every_memory_is_in_the_cover() -> None:
    covered = {MEMORIES[name]["name"] for name in VALUES["memory"] if name != "composed"}
    assert covered == MEMORY_CONFIGS.keys()


@pytest.mark.gloo
@pytest.mark.parametrize("case", marked(PAIRWISE + OTHERS + PACKED))
def test_a_layout_equals_one_plain_process(case: Case) -> None:
    differences, _ = differences_of(case)
    assert [each for each in differences if not each.passes] == []
    assert {each.kind for each in differences} == set(FLOORS)
    assert max(each.tolerance / FLOORS[each.kind] for each in differences) < ROUNDING


@pytest.mark.gloo
@pytest.mark.parametrize(
    "case",
    [
        Case(cp=2, stage=1, bf16=True),
        Case(tensor="TP2+SP", stage=2, bf16=True),
        Case(tensor="TP2", cp=2, stage=3, bf16=True),
        Case(cp=2, memory="infini", bf16=True),
        Case(cp=2, memory="landmark", stage=3, bf16=True),
        Case(tensor="TP2+SP", memory="rmt", stage=2, bf16=True),
        Case(cp=2, memory="hmt", stage=3, bf16=True),
    ],
    ids=str,
)
def test_bfloat16_is_close_to_plain_float32(case: Case) -> None:
    """Weights too are rounded (2^-9): the loss by 1e-3, a gradient's direction by 1e-2."""
    expected = reference(case).steps
    differences, found = differences_of(case)
    assert [each for each in differences if not each.passes] == []
    for step, plain_step in zip(found.steps, expected, strict=True):
        assert abs(step.loss / plain_step.loss - 1) < 5e-3
        assert abs(step.grad_norm / plain_step.grad_norm - 1) < 5e-2
    for name, gradient in found.steps[0].gradients.items():
        exact = expected[0].gradients[name].ravel()
        for replica in gradient:
            similarity = torch.cosine_similarity(replica.double().ravel(), exact, 0)
            assert similarity > 0.99, (name, float(similarity))


FP8 = ComputeConfig(fp8=True)


@pytest.mark.gloo
@pytest.mark.parametrize(
    "case",
    [
        Case(cp=2, stage=3, bf16=True, compute=FP8),
        Case(tensor="TP2", stage=2, bf16=True, compute=FP8),
        Case(tensor="TP2+SP", cp=2, bf16=True, memory="infini", compute=FP8),
        Case(tensor="TP2+SP", bf16=True, compute=ComputeConfig("selective", fp8=True)),
        Case(tensor="TP2+SP", bf16=True, compute=FP8, bias=True, lora=LoraConfig(4)),
    ],
    ids=str,
)
def test_fp8_over_ranks_is_as_close_as_fp8_in_one_process(case: Case) -> None:
    """What bfloat16 rounds otherwise tips a rounding to four bits here and there: a gradient's
    direction by 3e-3 to 5e-3, where FP8 itself costs 6e-3 to 1.4e-2.
    """
    differences, found = differences_of(case)
    assert [each for each in differences if not each.passes] == []
    alone = reference(case, torch.bfloat16).steps
    for step, other in zip(found.steps, alone, strict=True):
        assert abs(step.loss / other.loss - 1) < 1e-3
    for name, gradient in found.steps[0].gradients.items():
        exact = alone[0].gradients[name].double().ravel()
        for replica in gradient:
            similarity = torch.cosine_similarity(replica.double().ravel(), exact, 0)
            assert similarity > 0.99, (name, float(similarity))


@pytest.mark.parametrize("memory", VALUES["memory"])
def test_the_reference_clips_at_every_step(memory: str) -> None:
    """Else a wrong norm would change no weight."""
    assert all(step.grad_norm > 2 * CLIP for step in reference(Case(memory=memory)).steps)


@pytest.mark.parametrize("memory", [m for m in VALUES["memory"] if m not in ("none", "landmark")])
def test_the_reference_carries_memory_from_step_to_step(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(memory=memory)
    carried = reference(case).steps
    monkeypatch.setattr(plain, "detach", lambda state: None)
    forgotten = plain.train(subject_of(case).config, config_of(case), torch.float64).steps
    assert carried[0].loss == forgotten[0].loss
    assert abs(carried[1].loss / forgotten[1].loss - 1) > 100 * FLOORS["loss"]


def test_the_reference_imports_neither_megatron_core_nor_deepspeed() -> None:
    """In a process of its own, and its numbers are those used here."""
    program = (
        "import sys, torch; from model.config import FamMemory, ModelConfig;"
        "from train.checking import plain; from train.settings.config import validate;"
        "config = validate(eval(sys.argv[1])); model = eval(sys.argv[2]);"
        "print([step.loss for step in plain.train(config, model, torch.float64).steps]);"
        "print([m for m in sys.modules if m.startswith(('megatron', 'deepspeed', 'parallel'))])"
    )
    raw = subject_of(Case()).config.model_dump(mode="json")
    model = "ModelConfig(90, 2, 32, 4, 2, 48, 8, memory=FamMemory(slots=4, window=1), init_std=0.2)"
    printed = subprocess.run(
        [sys.executable, "-c", program, repr(raw), model],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert printed == [str([step.loss for step in reference(Case()).steps]), "[]"]


def test_the_set_of_layouts_holds_every_pair_of_values() -> None:
    held = set().union(*map(pairs_of, COVERING))
    for (a, of_a), (b, of_b) in combinations(VALUES.items(), 2):
        for x, y in product(of_a, of_b):
            impossible = 1 in (x, y) and a == "cp" and b in ("exchange", "layout")
            impossible |= (x, y) == ("hmt", "contiguous")
            assert impossible or (a, x, b, y) in held, (a, x, b, y)


def test_the_set_of_layouts_is_small_and_always_the_same() -> None:
    assert covering(candidates(), is_large) == COVERING
    assert len(COVERING) <= 45  # of 840
    assert sum(map(is_large, COVERING)) == 2  # TP2 x CP4, TP2+SP x CP4


def test_a_dear_combination_is_taken_only_for_a_pair_no_other_has() -> None:
    def cost(combination: dict[str, Any]) -> int:
        return combination["a"] * combination["b"]

    every = [{"a": a, "b": b, "c": c} for a, b, c in product([0, 1], [0, 1], [0, 1])]
    found = covering(every, cost)
    assert sum(map(cost, found)) == 1
    assert len(found) < len(every)
