"""What a folder of checkpoints calls them: step-00000200, and `latest` for people.

Without torch, for commands that list terabytes.
"""

from __future__ import annotations

from pathlib import Path

from data.durable import write_atomically

LATEST = "latest"


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's folder is named for."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in folder, oldest first."""
    return sorted(path for path in folder.glob("step-????????") if path.is_dir())


def point_to(checkpoint: Path) -> None:
    """Let `latest`, for people and their scripts, name a checkpoint; loading lists the folder.

    The names in the folder are on disk when this returns. `checkpoint rm` may do it beside a save.
    """
    write_atomically(checkpoint.with_name(LATEST), checkpoint.name, rivals=True)
