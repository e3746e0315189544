"""Ways of tests to the compiled attention kernel."""

import shutil

import pytest
import torch

from model import cpu_flash, kernels

needs_kernel = pytest.mark.skipif(
    not cpu_flash._capabilities().get("avx512_bf16")
    or shutil.which(cpu_flash.compiler_name()) is None,
    reason="the kernel is for CPUs that multiply bfloat16 by AVX-512, and needs a C++ compiler",
)


def use_compiled_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it take every query of its types, without compiling anything else."""
    monkeypatch.setattr(cpu_flash, "_FEWEST", dict.fromkeys(cpu_flash._FEWEST, 1))
    monkeypatch.setattr(cpu_flash, "takes", lambda dtype: dtype in (torch.float32, torch.bfloat16))
    monkeypatch.setattr(kernels, "is_compiled", lambda: True)
