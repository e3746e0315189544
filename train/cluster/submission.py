"""The job script of a run: rendered from its configuration, and then a file like any in slurm/."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from train.cluster.lead import lead_for, read_timing
from train.settings.config import Config

LIBRARY = Path("slurm/lib.sh")
SCRIPT_NAME = "job.sh"
"""Of a run folder: the script that was rendered for it."""

SCRIPT = """\
#!/usr/bin/env bash
# Rendered by `longhaul submit`, which it does not need: sbatch {script} [KEY=VALUE...]
# in the folder that it was submitted from.
{directives}
trap 'EARLY=USR1' USR1 # until lib.sh takes over

# ---- the site -------------------------------------------------------------------------------
RUN_DIR={run_dir} # checkpoints, metrics, attempts, DONE
CONTAINER={container} # an image with longhaul in it, run by pyxis; empty: .venv of this folder
LEAD_S={lead_s} # as in --signal above; the log says when steps and saves take longer
TRAIN_NODES={nodes} # of those asked for above: one that is unfit is left out if enough remain
# ---------------------------------------------------------------------------------------------

set -euo pipefail
cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this file from its own folder
source {library}

export JOB_SCRIPT={script}
rank_environment
print_versions
run_until_done {ranks} {command} "$@"
"""


class Request(NamedTuple):
    """What is asked of SLURM for a run."""

    nodes: int
    ranks_per_node: int
    gpus: bool = True  # a rank has a GPU of its own
    time: str = "24:00:00"
    spare: int = 0  # nodes more than are trained on
    lead_s: int | None = None  # None: as measured
    container: str = ""
    options: tuple[str, ...] = ()  # of sbatch, as --partition=name


def job_script(config: Config) -> Path:
    """Return where a run's script is written."""
    return config.run_dir / SCRIPT_NAME


def render(config: Config, file: Path, overrides: Sequence[str], request: Request) -> str:
    """Return the script that trains `file` with its overrides.

    config: what file and overrides resolve to. Raises ValueError where the time asked for does not
    hold the warning before its end, or that warning is shorter than a step and a save took.
    """
    lead_s = choose_lead(config.run_dir, request)
    total_s = seconds_of(request.time)
    if total_s <= 2 * lead_s:
        raise ValueError(
            f"--time {request.time} is {total_s} s, of which the last {lead_s} are for saving, and"
            f" at least as many must be left for training; ask for more than {2 * lead_s} s"
        )
    run_dir, changes = str(config.run_dir), [o for o in overrides if not o.startswith("run_dir=")]
    words = ["longhaul", "pretrain", str(file)]
    command = f'{shlex.join(words)} run_dir="$RUN_DIR"'
    return SCRIPT.format(
        script=shlex.quote(str(job_script(config))),
        directives="\n".join(f"#SBATCH {each}" for each in directives(config, request, lead_s)),
        run_dir=shlex.quote(run_dir),
        container=shlex.quote(request.container) if request.container else "",
        lead_s=lead_s,
        nodes=request.nodes,
        library=LIBRARY,
        ranks=request.ranks_per_node,
        command=" ".join([command, *map(shlex.quote, changes)]),
    )


def directives(config: Config, request: Request, lead_s: int) -> list[str]:
    """Return sbatch's options; those of the request come last and win."""
    if request.gpus:  # whole nodes, and all of their memory
        resources = [f"--gpus-per-node={request.ranks_per_node}", "--exclusive", "--mem=0"]
    else:
        resources = [f"--cpus-per-task={request.ranks_per_node}"]
    return [
        f"--job-name={config.name}",
        f"--nodes={request.nodes + request.spare}",
        "--ntasks-per-node=1",  # which starts that node's ranks
        *resources,
        f"--time={request.time}",
        "--output=%x-%j.out",
        "--open-mode=append",  # a restart adds to the log
        f"--signal=B:USR1@{lead_s}",  # this shell alone hears it, so long before the limit
        "--requeue",
        "--wait-all-nodes=1",
        *request.options,
    ]


def choose_lead(run_dir: Path, request: Request) -> int:
    """Return the seconds between the warning and the limit.

    Raises ValueError where those asked for are fewer than this run has been seen to need.
    """
    if request.lead_s is None:
        return lead_for(run_dir)
    timing = read_timing(run_dir)
    if timing is not None and timing.needed_s > request.lead_s:
        raise ValueError(
            f"--lead {request.lead_s} is too short: in {run_dir} a step took up to"
            f" {timing.step_s:.1f} s and a save {timing.save_s:.1f} s, so stopping may need"
            f" {timing.needed_s:.0f} s; use --lead {lead_for(run_dir)}, or leave it out"
        )
    return request.lead_s


def seconds_of(time: str) -> int:
    """Return the seconds of SLURM's minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2})|(\d+(:\d+){0,2})", time):
        raise ValueError(f"--time {time} is no time of SLURM; write 24:00:00, or 2-12 for 2.5 days")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 1:
        return 60 * parts[0]
    hours, minutes, seconds = (0, *parts)[-3:]
    return (hours * 60 + minutes) * 60 + seconds
