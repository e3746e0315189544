"""Checkpoints in a moment: real manifests and hashes, files of a few bytes, no torch."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.train.runs import small
from train.checkpoints.manifest import Manifest, values_hash
from train.settings.config import validate


def store(folder: Path, step: int, *, ranks: int = 2, **settings: Any) -> Path:
    """Write a checkpoint; settings of its configuration such as checkpoint__keep_every=20."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    files = {}
    for rank in range(ranks):
        content = f"step {step}, rank {rank} ".encode() * 50
        name = f"rank-{rank:05d}.safetensors"
        (path / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files[name] = {"sha256": digest, "bytes": len(content)}
    config = validate(small(**settings)).model_dump(mode="json")
    manifest = Manifest(
        step=step,
        position=8 * step,
        updates=step - 1,
        nonfinite=0,
        layout={"tp": 2, "cp": 1, "dp": 1, "zero": 3},
        config=config,
        data="0123456789abcdef0123",
        vocab_size=257,
        parameters={
            "embed.weight": {"shape": [130, 64], "dim": 0, "stride": 1},
            "norm.weight": {"shape": [64], "dim": None, "stride": 1},
        },
        versions={"torch": "2.13.0", "longhaul": "0.1.0"},
        files=files,
    )
    values = asdict(manifest)
    values["sha256"] = values_hash(values)
    (path / "manifest.json").write_text(json.dumps(values))
    return path


def store_run(run: Path, *steps: int, **settings: Any) -> list[Path]:
    """Write a run's checkpoints and the pointer; return their paths."""
    paths = [store(run / "checkpoints", step, **settings) for step in steps]
    (run / "checkpoints/latest").write_text(paths[-1].name)
    return paths


def damage(checkpoint: Path) -> Path:
    """Flip a bit of a file, whose size stays; return the file."""
    file = checkpoint / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    return file
