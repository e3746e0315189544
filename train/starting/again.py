"""How this run is gone on with: the command line, and whether there is anything left to do."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path


def nothing_left(run_dir: Path, step: int, steps: int) -> str:
    """Return what is said of a run at a step that has reached train.steps=steps."""
    where = f"step {step} of {steps}" if step == steps else f"step {step}, train.steps={steps}"
    return (
        f"nothing left to train: {where}; {more_steps(step)}"
        f" (`longhaul evaluate {run_dir}` measures it anew)"
    )


def more_steps(step: int) -> str:
    """Return what to do for a run at this step to go on."""
    return f"give train.steps={2 * step}, or another number above {step}"


def launch_command(ranks: int, *words: str) -> str:
    """Return the command line that starts so many ranks of `longhaul words...` on this machine."""
    torchrun = ["torchrun", "--standalone", "--no-python", "--nproc-per-node", str(ranks)]
    return shlex.join([*torchrun, "longhaul", *words])


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
