"""What a run is made of: its configuration, code, environment and data, written down and logged."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import socket
import subprocess
from pathlib import Path

from data.durable import write_atomically
from train.tracking.tracker import NoTracker, Tracker

_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_PARTITION",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
    "SLURM_CLUSTER_NAME",
)


def describe_run(
    tracker: Tracker | NoTracker, folder: Path, config_text: str, data_manifest: str
) -> None:
    """Write down in `folder`, and log, what this run is made of.

    Files, also uploaded: config.yaml (resolved), environment.txt, data_manifest.json. Where a
    resumed run brings another version, the earlier one is kept as config.1.yaml and so on.
    Tags: the commit of this code, whether it was changed since, the host, the SLURM job.
    OSError: `folder` cannot be written.
    """
    texts = {
        "config.yaml": config_text,
        "environment.txt": environment(),
        "data_manifest.json": data_manifest,
    }
    for name, text in texts.items():
        for path in _keep(folder / name, text):
            tracker.artifact(path)
    tags: dict[str, object] = {"host": socket.gethostname()}
    if user := os.environ.get("USER"):
        tags["mlflow.user"] = user
    for name, value in os.environ.items():
        if name in _SLURM:
            tags[name.lower().replace("_", ".", 1)] = value
    if (source := source_commit(Path(__file__))) is not None:
        tags["mlflow.source.git.commit"], tags["git.dirty"] = source
    tracker.tags(tags)


def environment() -> str:
    """Return Python, the platform and every installed distribution, as pip freeze does."""
    installed = {
        f"{dist.metadata['Name']}=={dist.version}" for dist in importlib.metadata.distributions()
    }
    head = f"# Python {platform.python_version()} on {platform.platform()}\n"
    return head + "".join(f"{line}\n" for line in sorted(installed, key=str.lower))


def source_commit(file: Path) -> tuple[str, bool] | None:
    """Return the git commit of the code around `file` and whether tracked files differ from it.

    None where git does not track the file: an installed wheel, whose site-packages may well
    lie inside the working copy of something else.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.resolve().parent), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None


def _keep(path: Path, text: str) -> list[Path]:
    """Write `text` to `path`; an earlier, different text there moves to a numbered name."""
    kept = []
    if path.exists() and path.read_text() != text:
        numbered = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
        kept.append(path.rename(next(free for free in numbered if not free.exists())))
    write_atomically(path, text)
    return [path, *kept]
