"""Lets megatron-core's tensor-parallel layers run on CPU processes.

megatron-core names torch.cuda in a few places. Inside its modules, and only there, the name `torch`
is rebound to a proxy that answers for the CPU; torch itself and other libraries see nothing.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch

TARGETS = (
    "tensor_parallel.mappings",
    "tensor_parallel.layers",
    "tensor_parallel.utils",
    "utils",
)
"""Modules of megatron.core that ask torch.cuda for the current device."""


class _Cuda(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")


class _Torch(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _Cuda("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def install_cpu_adapter() -> None:
    """Rebind `torch` in megatron-core's modules; for processes that compute on the CPU."""
    proxy = _Torch()
    for target in TARGETS:
        importlib.import_module(f"megatron.core.{target}").torch = proxy  # type: ignore[attr-defined]
