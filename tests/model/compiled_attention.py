"""Ways of tests to the compiled attention kernel."""

import pytest
import torch

from model import cpu_flash, kernels

needs_kernel = pytest.mark.skipif(
    not all(map(torch.cpu.get_capabilities().get, ("avx512_f", "avx512_bf16"))),
    reason="the kernel is for CPUs with AVX-512 and its bfloat16",
)


def use_compiled_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it take every float32 and bfloat16 query, without compiling anything else."""
    every = {dtype: (needs, 1) for dtype, (needs, _) in cpu_flash._PAYS_FROM.items()}
    monkeypatch.setattr(cpu_flash, "_PAYS_FROM", every)
    monkeypatch.setattr(kernels, "is_compiled", lambda: True)
