"""Copies some tensors of a safetensors file into another one: bytes, without reading them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_CHUNK_BYTES = 16 << 20


def copy_tensors(source: Path, target: Path, keep: Callable[[str], bool]) -> str:
    """Write the tensors whose name is kept into target, in their order; return its sha256.

    The file is on disk when this returns. Raises OSError where one of them cannot be read or
    written, and ValueError where source is no safetensors file.
    """
    digest = hashlib.sha256()
    with source.open("rb") as old, target.open("wb") as new:

        def write(content: bytes) -> None:
            new.write(content)
            digest.update(content)

        entries, data = _read_header(old, source)
        kept = {name: entry for name, entry in entries.items() if keep(name)}
        # Offsets keep their order, so what was aligned to its own width stays so: wide types first.
        names = sorted(kept, key=lambda name: int(kept[name]["data_offsets"][0]))
        write(_header({name: kept[name] for name in names}))
        for name in names:
            begin, end = kept[name]["data_offsets"]
            old.seek(data + begin)
            _copy(old, end - begin, write)
        new.flush()
        os.fsync(new.fileno())
    return digest.hexdigest()


def _read_header(file: IO[bytes], path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the entries of the tensors, and where their data begins."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = dict(json.loads(file.read(length)))
    except (struct.error, ValueError, MemoryError, OverflowError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _header(entries: dict[str, dict[str, Any]]) -> bytes:
    moved, end = {}, 0
    for name, entry in entries.items():
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        moved[name] = entry | {"data_offsets": [end, end + size]}
        end += size
    text = json.dumps(moved, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy(file: IO[bytes], count: int, write: Callable[[bytes], None]) -> None:
    while count:
        content = file.read(min(count, _CHUNK_BYTES))
        if not content:
            raise OSError(f"{file.name} ends {count} bytes before its last tensor does")
        write(content)
        count -= len(content)
