"""A CPU's attention kernel of our own (cpu_flash.cpp), compiled where it runs.

aten's CPU kernel does bfloat16 at float32's rate; this one at the rate of the matrix product. It is
used under `train.compile` on x86 CPUs with AVX-512, and built once for each kind of CPU, in the
folder of torch's extensions (TORCH_EXTENSIONS_DIR).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from model.compiled import compiler_name

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math"),  # or rounding makes no vectors; NaN stays NaN
)
_PAYS_FROM = {torch.bfloat16: ("avx512_bf16", 32), torch.float32: ("avx512_f", 128)}
"""What of the CPU, and how many queries for which keys are copied into blocks."""


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (stride, ctypes.c_int64) for stride in ("batch", "head", "row")
    ]


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("batch", "heads", "key_heads", "queries", "keys", "width", "causal")
    ]


class CompiledFlash:
    """A model.kernels.Kernel in bfloat16 or float32; strided inputs are read as they lie."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""
        q, k, v = map(_dense_rows, (q, k, v))
        out, lse = _rows_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        views = map(_view, (q, k, v, out))
        _call("attention_forward", q, *views, _address(lse), _sizes(q, k, causal))
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv."""
        dout, q, k, v, out = (_dense_rows(x.to(q.dtype)) for x in (dout, q, k, v, out))
        lse = lse.contiguous()
        dq, dk, dv = map(_rows_like, (q, k, v))
        views = [_view(x) for x in (dout, q, k, v, out)]
        gradients = map(_view, (dq, dk, dv))
        sizes = _sizes(q, k, causal)
        _call("attention_backward", q, *views, _address(lse), *gradients, sizes)
        return dq, dk, dv


def takes(q: Tensor) -> bool:
    """Return whether this CPU has the kernel for queries like q [B, H, Sq, K], and gains by it."""
    if q.dtype not in _PAYS_FROM:
        return False
    capability, rows = _PAYS_FROM[q.dtype]
    return q.shape[2] >= rows and q.shape[3] % 2 == 0 and _has(capability)


@functools.cache
def _has(capability: str) -> bool:
    return bool(torch.cpu.get_capabilities().get(capability))


def _call(name: str, q: Tensor, *arguments: object) -> None:
    error = getattr(_library(), name)(int(q.dtype == torch.bfloat16), *arguments)
    if error is not None:
        raise RuntimeError(f"{name} of {q.dtype} {tuple(q.shape)}: {error.decode()}")


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the kernel, built if this kind of machine has not built it before."""
    from torch.utils import cpp_extension as torch_paths

    headers = [f"-I{path}" for path in torch_paths.include_paths()]
    libraries = [f"-L{path}" for path in torch_paths.library_paths()]
    command = [compiler_name(), *_FLAGS, *headers, str(_SOURCE), *libraries, "-ltorch_cpu", "-lc10"]
    kind = (_SOURCE.read_text(), torch.__version__, command, torch.cpu.get_capabilities())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or torch_paths.get_default_build_root()
    built = Path(root, "longhaul", f"{hashlib.sha256(repr(kind).encode()).hexdigest()[:16]}.so")
    built.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(built.with_suffix(".lock")):  # the system's: it ends with the process
        if not built.exists():
            unfinished = built.with_suffix(".unfinished")
            done = subprocess.run(
                [*command, "-o", str(unfinished)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(
                    f"{command[0]} could not compile {_SOURCE}: {done.stderr[-2000:]}\nname another"
                    " compiler in CXX, or leave train.compile out"
                )
            unfinished.replace(built)
    library = ctypes.CDLL(str(built))
    for name in ("attention_forward", "attention_backward"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_like(x: Tensor) -> Tensor:
    """Return an empty tensor [B, H, S, K] that lies as [B, S, H, K], which a block goes on with."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _view(x: Tensor) -> _View:
    return _View(x.data_ptr(), *x.stride()[:3])


def _address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _sizes(q: Tensor, k: Tensor, causal: bool) -> _Sizes:
    return _Sizes(q.shape[0], q.shape[1], k.shape[1], *q.shape[2:3], k.shape[2], q.shape[3], causal)
