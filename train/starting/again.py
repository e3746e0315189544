"""The command line that goes on with this run."""

from __future__ import annotations

import os
import shlex
import sys


def continue_command(steps: int | None = None) -> str:
    """Return the command line that goes on with this run, with more steps if given."""
    words = ["longhaul", *sys.argv[1:]]
    if job := os.environ.get("SLURM_JOB_NAME"):
        words = ["sbatch", os.environ.get("JOB_SCRIPT", f"slurm/{job}.sh"), *sys.argv[3:]]
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local is not None and words[0] == "longhaul":
        one_node = ["--standalone"] if local == os.environ.get("WORLD_SIZE") else []
        words = ["torchrun", *one_node, "--no-python", "--nproc-per-node", local, *words]
    if steps is not None:
        words = [word for word in words if not word.startswith("train.steps=")]
        words.append(f"train.steps={steps}")
    return shlex.join(word for word in words if word != "--fresh")
