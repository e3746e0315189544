"""Which run `--fork NAME` means: its folder, and whether that is free for it.

Apart from what the fork takes along, because a job's script asks where its attempts are to be
written down (`longhaul pretrain --print-run-dir`), and no torch is needed for that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.cluster.attempts import is_note
from train.settings.config import Config, ConfigError, validate
from train.starting.lock import LOCK

PARENT = "parent.json"


def name_fork(config: Config, name: str) -> tuple[Config, dict[str, Any] | None]:
    """Return the configuration of the fork `name` of config's run, and its parent.json if begun.

    Raises ConfigError where another run has the name.
    """
    values = config.model_dump(mode="json")
    values |= {"name": name, "run_dir": str(config.run_dir.parent / name)}
    values["model"]["init_from"] = None  # it begins from its parent
    child = validate(values, source=f"--fork {name}")
    if child.run_dir == config.run_dir:
        raise fork_problem(name, "this run itself has the name; give another one")
    # Looked at before the parent is read: rank 0, which may be further, writes that first.
    taken = child.run_dir.exists() and any(
        not (path.name.startswith(PARENT) or path.name == LOCK or is_note(path.name))
        for path in child.run_dir.iterdir()
    )
    origin = read_parent(child.run_dir)
    ours = origin is not None and Path(origin["run"]) == config.run_dir
    if not ours and (taken or origin is not None):
        text = f"{child.run_dir} is another run's folder already; give another name"
        raise fork_problem(name, text)
    return child, origin


def read_parent(run_dir: Path) -> dict[str, Any] | None:
    """Return where a run comes from: its parent's run, checkpoint, step; None for a first one."""
    try:
        found: dict[str, Any] = json.loads((run_dir / PARENT).read_text())
    except FileNotFoundError:
        return None
    return found


def fork_problem(name: str, text: str) -> ConfigError:
    """Return an error that names the option."""
    return ConfigError(f"--fork {name}", [text])
