"""What a rank does not import, though it is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.hidden import hidden

without_gpu = pytest.mark.skipif(
    torch.cuda.device_count() > 0 or importlib.util.find_spec("triton") is None,
    reason="a rank on the CPU, on a machine that has Triton",
)


def run(code: str, **environment: str) -> str:
    """Run code in a process of its own: other tests import what is asked for."""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_what_is_hidden_cannot_be_imported_and_is_there_again_afterwards() -> None:
    sys.modules.pop("colorsys", None)
    with hidden("colorsys", "os"), pytest.raises(ImportError):
        import colorsys
    import colorsys

    assert colorsys is sys.modules["colorsys"]
    with hidden("colorsys"):  # a second one would not be what others hold
        assert sys.modules["colorsys"] is colorsys


@without_gpu
def test_a_rank_on_the_cpu_does_not_import_triton() -> None:
    run(
        """
import importlib.util, sys
import train.build, torch._dynamo
assert not any(name.split(".")[0] == "triton" for name in sys.modules), "imported all the same"
assert importlib.util.find_spec("triton") is not None, "still hidden"
"""
    )


@without_gpu
@pytest.mark.slow  # g++, and torch's compiler twice
def test_nor_for_kernels_that_were_compiled_before(tmp_path: Path) -> None:
    code = """
import sys, torch
import train.build
from model.compiled import fused, use_compiled
use_compiled(True)
fused(lambda x: (2 * x).exp().sum(-1))(torch.ones(3, 5))
print("triton" in sys.modules)
"""
    run(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))  # torch itself imports it to store a kernel
    assert run(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) == "False\n"
