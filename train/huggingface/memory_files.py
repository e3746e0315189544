"""memory.json and memory.safetensors: what the standard format has no place for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from model.config import HmtMemory
from train.checkpoints.folder import Manifest
from train.settings.config import Config
from train.settings.memories import to_memory_config

MEMORY, MEMORY_TENSORS = "memory.json", "memory.safetensors"
FORMAT = 1


class StoredMemory(NamedTuple):
    """What memory.json says."""

    keys: Any  # of `model.memory`: one memory's or a list
    segment_len: int


def memory_values(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Return the content of memory.json for a checkpoint."""
    keys = config.model.memory.model_dump(mode="json")
    memory = to_memory_config(config.model.memory)
    if isinstance(memory, HmtMemory) and manifest.step >= (memory.search_from or 0):
        # An imported model is at step 0, and this one's search is trained.
        parts = keys if isinstance(keys, list) else [keys]
        next(part for part in parts if part["name"] == "hmt")["search_from"] = 0
    return {
        "format": FORMAT,
        "memory": keys,
        "segment_len": config.data.segment_len,
        "tensors": MEMORY_TENSORS,
    }


def read_memory(folder: Path) -> StoredMemory | None:
    """Return what a folder says of its memory, None where it has none.

    Raises ValueError for one that cannot be read, or of a newer longhaul.
    """
    path = folder / MEMORY
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        stored = StoredMemory(values["memory"], int(values["segment_len"]))
        version = values["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}); export the checkpoint again"
        ) from None
    if version != FORMAT:
        raise ValueError(
            f"{path} is of format {version}, and this longhaul reads {FORMAT}: use the longhaul"
            " that wrote it, or a newer one"
        )
    return stored
