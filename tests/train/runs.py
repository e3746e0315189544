"""A small valid configuration that tests change, and the command line as a process."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from train.settings.config import ConfigError, validate

ROOT = Path(__file__).resolve().parents[2]

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 128,
    },
    "data": {"train": "shards/train", "segment_len": 64, "sample_len": 256},
    "train": {"steps": 100, "batch_size": 8, "lr": 0.001},
}


def small(**changes: object) -> dict[str, Any]:
    """Return the small configuration with dotted keys (`train__steps=5`) changed."""
    raw = copy.deepcopy(SMALL)
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = raw
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return raw


def problems(raw: dict[str, Any], world_size: int | None = None) -> tuple[str, ...]:
    """Return the problem lines of a configuration, which must have some."""
    with pytest.raises(ConfigError) as caught:
        validate(raw, world_size=world_size)
    return caught.value.problems


def write(folder: Path, raw: object) -> Path:
    """Return the path of a YAML file with these values (or this text)."""
    path = folder / "run.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
    return path


def longhaul(
    *arguments: object, code: str = "from train.cli import main; main()", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own and return how it ended."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,  # never waited for in a good run
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
    )
