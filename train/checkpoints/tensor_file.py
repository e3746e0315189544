"""Writes a safetensors file tensor by tensor, hashing it on the way.

The library's own writer copies all tensors into bytes first and gives no hash. Here one tensor is
asked for at a time, so what is written may be larger than memory. The layout is safetensors' own
(a length, a JSON header, the data); the library reads the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 16 << 20


class Spec(NamedTuple):
    """What a tensor will be."""

    dtype: torch.dtype
    shape: torch.Size | tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Return what tensors at hand are."""
    return {name: Spec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def write_tensors(
    path: Path,
    specs: Mapping[str, Spec],
    get: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write the tensors of specs, each from one call of get; return the file's sha256.

    The file is on disk when this returns. Raises OSError where it cannot be written, and ValueError
    where get returns another type or shape than was announced.
    """
    # Wide types first, as the library does it: every tensor then lies at a multiple of its width.
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(content: bytes | memoryview) -> None:
            file.write(content)
            digest.update(content)

        write(_header(names, specs, metadata))
        for name in names:
            for chunk in _bytes(name, get(name), specs[name]):
                write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(
    names: list[str], specs: Mapping[str, Spec], metadata: Mapping[str, str] | None
) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + specs[name].nbytes
        entries[name] = {
            "dtype": _TYPES[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(name: str, tensor: Tensor, spec: Spec) -> list[memoryview]:
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != tuple(spec.shape):
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)},"
            f" announced as {spec.dtype} {list(spec.shape)}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().data
    return [content[i : i + _CHUNK_BYTES] for i in range(0, len(content), _CHUNK_BYTES)]
