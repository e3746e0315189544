"""What can happen to a checkpoint: each fault done to one, and the text that must name it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from train.checkpoints.names import list_checkpoints


class Fault(NamedTuple):
    """One kind of damage."""

    name: str
    said: str  # as a table for people has it
    do: Callable[[Path, random.Random], str]
    """Damages a checkpoint; returns what a message must contain."""
    needs: int = 1
    """Files of ranks that a checkpoint must have."""
    older: bool = False
    """Whether there must be an older checkpoint."""
    refused: bool = False
    """Whether the command line then refuses, before any rank starts, instead of going back."""


def rank_files(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint's ranks."""
    return sorted(checkpoint.glob("rank-*.safetensors"))


def applicable(checkpoint: Path) -> list[Fault]:
    """Return the faults that can be done to a checkpoint beside the others in its folder."""
    files, others = len(rank_files(checkpoint)), len(list_checkpoints(checkpoint.parent)) - 1
    return [fault for fault in FAULTS if files >= fault.needs and others >= fault.older]


def flip_bit(checkpoint: Path, chance: random.Random) -> str:
    """Change one bit, as a disk does: neither size nor times show it."""
    file = chance.choice(rank_files(checkpoint))
    stat = file.stat()
    with file.open("r+b") as content:
        content.seek(chance.randrange(stat.st_size))
        byte = content.read(1)[0]
        content.seek(-1, os.SEEK_CUR)
        content.write(bytes([byte ^ 1 << chance.randrange(8)]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return f"{file.name}: its sha256 is not the manifest's"


def truncate(checkpoint: Path, chance: random.Random) -> str:
    file = chance.choice(rank_files(checkpoint))
    size = file.stat().st_size
    left = chance.randrange(size)
    os.truncate(file, left)
    return f"{file.name}: {left} bytes, {size} were written"


def empty(checkpoint: Path, chance: random.Random) -> str:
    """Leave the length and lose the content, as file systems do at a power failure."""
    file = chance.choice(rank_files(checkpoint))
    file.write_bytes(bytes(file.stat().st_size))
    return f"{file.name}: its sha256 is not the manifest's"


def remove(checkpoint: Path, chance: random.Random) -> str:
    file = chance.choice(rank_files(checkpoint))
    file.unlink()
    return f"{file.name}: missing"


def exchange(checkpoint: Path, chance: random.Random) -> str:
    one, other = chance.sample(rank_files(checkpoint), 2)
    aside = checkpoint / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return ".safetensors: "  # the size or the hash of the first of them


def take_older(checkpoint: Path, chance: random.Random) -> str:
    """Mix two steps: one rank's file from another checkpoint."""
    older = [path for path in list_checkpoints(checkpoint.parent) if path != checkpoint]
    source = chance.choice(rank_files(chance.choice(older)))
    target = chance.choice(rank_files(checkpoint))
    shutil.copy(source, target)
    return f"{target.name}: "


def lose_manifest(checkpoint: Path, chance: random.Random) -> str:
    (checkpoint / "manifest.json").unlink()
    return f"{checkpoint.name}: no readable manifest.json"


def cut_manifest(checkpoint: Path, chance: random.Random) -> str:
    file = checkpoint / "manifest.json"
    os.truncate(file, chance.randrange(file.stat().st_size))
    return f"{checkpoint.name}: no readable manifest.json"


def change_manifest(checkpoint: Path, chance: random.Random) -> str:
    """Let it tell another position: valid JSON, and a plausible number."""
    file = checkpoint / "manifest.json"
    values = json.loads(file.read_text())
    values["position"] += chance.choice((1, 4, -4))
    file.write_text(json.dumps(values, indent=1, sort_keys=True))
    return "manifest.json: its content is not what was written"


def come_from_the_future(checkpoint: Path, chance: random.Random) -> str:
    file = checkpoint / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    return f"{checkpoint.name}: format 99"


FAULTS = (
    Fault("flip", "one bit flipped", flip_bit),
    Fault("truncate", "file cut short", truncate),
    Fault("empty", "content lost, length kept", empty),
    Fault("remove", "a rank's file missing", remove),
    Fault("exchange", "two ranks' files exchanged", exchange, needs=2),
    Fault("older", "a file of another step", take_older, older=True),
    Fault("lose-manifest", "manifest missing", lose_manifest),
    Fault("cut-manifest", "manifest cut short", cut_manifest),
    Fault("change-manifest", "a number in the manifest changed", change_manifest),
    Fault("newer", "written by a newer version", come_from_the_future, refused=True),
)
