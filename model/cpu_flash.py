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
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math"),  # or rounding makes no vectors; NaN stays NaN
)
_FEWEST = {torch.bfloat16: 32, torch.float32: 128}
"""Queries of a head for which it pays to copy the keys into blocks."""


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (stride, ctypes.c_int64) for stride in ("batch", "head", "row")
    ]


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("batch", "heads", "key_heads", "queries", "keys", "width", "causal")
    ]


def gains(q: Tensor) -> bool:
    """Return whether the kernel is faster than aten's for queries like q [B, H, Sq, K]."""
    return q.shape[-2] >= _FEWEST[q.dtype] and q.shape[-1] % 2 == 0


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return (out, lse); see model.kernels.Kernel. K is even; views are read as they lie."""
    q, k, v = map(_dense_rows, (q, k, v))
    out, lse = _rows_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    views = _views(q, q, k, v, out)
    _call("attention_forward", q, *views, _address(lse), _sizes(q, k, v, causal))
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv; the same for one thread and many, of which one works on a key head."""
    dout, q, k, v, out = map(_dense_rows, (dout, q, k, v, out))
    assert lse.dtype == torch.float32 and dout.shape == q.shape == out.shape, (
        lse.dtype,
        dout.shape,
    )
    lse = lse.contiguous()
    dq, dk, dv = map(_rows_like, (q, k, v))
    views, gradients = _views(q, dout, q, k, v, out), _views(q, dq, dk, dv)
    sizes = _sizes(q, k, v, causal)
    _call("attention_backward", q, *views, _address(lse), *gradients, sizes)
    return dq, dk, dv


@functools.cache
def takes(dtype: torch.dtype) -> bool:
    """Return whether this CPU has the kernel for dtype, and its library the products.

    Not bfloat16 with AMX, which aten's kernel uses as well, and where this one was not measured.
    """
    has = _capabilities()
    units = has.get("avx512_bf16") and not has.get("amx_bf16")
    if dtype not in _FEWEST or not (units if dtype == torch.bfloat16 else has.get("avx512_f")):
        return False
    tiny = torch.ones(1, 1, 2, 2, dtype=dtype)
    try:
        forward(tiny, tiny, tiny, False)
    except RuntimeError:  # oneDNN was told to use less of the CPU than there is
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """Return the kernel, built if this kind of machine has not built it before.

    Raises ValueError where it cannot be.
    """
    from torch.utils import cpp_extension as torch_paths

    headers = [f"-I{path}" for path in torch_paths.include_paths()]
    libraries = [f"-L{path}" for path in torch_paths.library_paths()]
    compiler = compiler_name()
    command = [compiler, *_FLAGS, *headers, str(_SOURCE), *libraries, "-ltorch_cpu", "-lc10"]
    machine = sorted(_capabilities().items())
    kind = repr((_SOURCE.read_text(), torch.__version__, command, machine))
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or torch_paths.get_default_build_root()
    built = Path(folder, "longhaul", f"{hashlib.sha256(kind.encode()).hexdigest()[:16]}.so")
    try:
        if not built.exists():
            _build(command, built)
        found = ctypes.CDLL(str(built))
    except OSError as error:
        raise ValueError(
            f"train.compile keeps a CPU's attention kernel in {built.parent}, which failed:"
            f" {error}; name a folder to write and run from in TORCH_EXTENSIONS_DIR, or leave"
            " train.compile out"
        ) from error
    for name in ("attention_forward", "attention_backward"):
        getattr(found, name).restype = ctypes.c_char_p
    return found


def compiler_name() -> str:
    """Return the C++ compiler, as torch's compiler finds it."""
    return os.environ.get("CXX", "g++")


def _capabilities() -> Mapping[str, object]:
    """Return what torch says of this CPU; nothing, where it is too old to say."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _build(command: list[str], built: Path) -> None:
    """Whoever comes while another builds builds as well: each its own file, renamed when whole."""
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        whole = Path(folder, built.name)
        done = subprocess.run(
            [*command, "-o", str(whole)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ValueError(
                f"{command[0]} could not compile {_SOURCE}: {done.stderr[-2000:]}\nname another"
                " compiler in CXX, or leave train.compile out"
            )
        whole.replace(built)


def _call(name: str, q: Tensor, *arguments: object) -> None:
    error = getattr(library(), name)(int(q.dtype == torch.bfloat16), *arguments)
    if error is not None:
        raise RuntimeError(f"{name} of {q.dtype} {tuple(q.shape)}: {error.decode()}")


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_like(x: Tensor) -> Tensor:
    """Return an empty tensor [B, H, S, K] that lies as [B, S, H, K], which a block goes on with."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _views(q: Tensor, *tensors: Tensor) -> list[_View]:
    assert all(x.dtype == q.dtype for x in tensors), [x.dtype for x in tensors]
    return [_View(x.data_ptr(), *x.stride()[:3]) for x in tensors]


def _address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _sizes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> _Sizes:
    assert k.shape == v.shape and q.shape[3] == k.shape[3] and q.shape[3] % 2 == 0, (
        q.shape,
        k.shape,
    )
    assert q.shape[0] == k.shape[0] and q.shape[1] % k.shape[1] == 0, (q.shape, k.shape)
    return _Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], causal)
