"""The Triton kernels of the grouped softmax against their slow twin, in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.memory.grouped import choose_grouped
from model.memory.grouped_softmax import GroupedSoftmax
from tests.model.triton_twin import CASES

TOLERANCE = {"float32": 2e-6, "float16": 2e-3}
"""Sums are float32; float16 rounds shares and results to 11 bits."""


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """Return each case's errors: one process, for Triton is told to interpret before its import."""
    root = Path(__file__).parents[2]
    answer = subprocess.run(
        [sys.executable, "-m", "tests.model.triton_twin"],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    result: dict[str, dict[str, float]] = json.loads(answer.stdout)
    return result


@pytest.mark.parametrize("name", CASES)
def test_is_the_slow_twin(name: str, found: dict[str, dict[str, float]]) -> None:
    assert set(found[name]) == {"out", "lse", "dq", "dk", "dv"}
    for label, error in found[name].items():
        assert error < TOLERANCE[CASES[name][-1]], (label, error)


@pytest.mark.parametrize(
    ("device", "dtype", "dims", "block", "fused"),
    [
        ("cpu", torch.float32, 64, 64, False),
        ("meta", torch.float32, 64, 64, False),
        ("cuda", torch.bfloat16, 64, 51, True),
        ("cuda", torch.bfloat16, 128, 128, True),
        ("cuda", torch.float32, 64, 64, True),
        ("cuda", torch.float32, 128, 64, False),
        ("cuda", torch.float32, 64, 65, False),
        ("cuda", torch.float64, 64, 64, False),
        ("cuda", torch.bfloat16, 96, 64, False),
        ("cuda", torch.bfloat16, 64, 256, False),
    ],
)
def test_the_kernel_is_chosen_by_what_it_takes(
    device: str, dtype: torch.dtype, dims: int, block: int, fused: bool
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 2, 8, dims, dtype=dtype, device=device)
    kernel = choose_grouped(q, block)
    assert (type(kernel) is not GroupedSoftmax) == fused
