"""Elementwise chains as one kernel each: torch.compile where asked for, plain torch elsewhere.

Matrix products and attention have kernels of their own; what lies between them (norms, rotations,
gates, the loss) is bound by memory, and a chain of operations reads and writes it once each. Where
the switch is on, a CPU's attention is compiled as well (cpu_flash.py).

One switch for the process, as torch's own backends have them. Results differ by rounding.
"""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from model import cpu_flash

P = ParamSpec("P")
T = TypeVar("T")

_on = False
_LIMITED = "recompile_limit" in inspect.signature(torch.compile).parameters
_KINDS = 64
"""Of calls to one function; training and evaluation with any memory make up to a dozen."""


def use_compiled(on: bool) -> None:
    """Compile what is `fused` from now on, or do not.

    Raises ValueError where that needs a C++ compiler (on a CPU) and there is none that works.
    """
    global _on
    if on and not torch.cuda.is_available():
        compiler = cpu_flash.compiler_name()
        if shutil.which(compiler) is None:
            raise ValueError(
                f"train.compile needs a C++ compiler, and there is no {compiler}; install one, name"
                " it in CXX, or leave train.compile out"
            )
        for dtype in (torch.float32, torch.bfloat16):
            cpu_flash.takes(dtype)  # built now, or refused, before ranks wait for one another
    _on = on


def is_compiled() -> bool:
    """Return whether the switch is on."""
    return _on


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """Return function, as one kernel while the switch is on; it may write to arguments alone."""

    @functools.cache  # not before it is asked for: the compiler alone takes seconds to import
    def kernel() -> Callable[P, T]:
        from torch._dynamo import config as dynamo

        # Dynamic: a kernel for each kind of call (types, dimensions, gradients) and not for each
        # shape, so that no result depends on which came first. Beyond torch's 8 kinds it would run
        # the plain function. In torch 2.13 the setting holds for this thread alone, and a GPU's
        # backward has one of its own: there it is the function's. 2.11 has the setting only.
        dynamo.recompile_limit = max(dynamo.recompile_limit, _KINDS)
        own: dict[str, Any] = {"recompile_limit": _KINDS} if _LIMITED else {}
        return torch.compile(function, dynamic=True, **own)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return (kernel() if _on else function)(*args, **kwargs)

    return run
