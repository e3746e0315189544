r"""The command `longhaul preflight`: is this machine, are these nodes, fit to train?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def preflight(
    run_dir: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The run's folder, which must be writable.")
    ] = Path("runs"),
    ranks_per_node: Annotated[
        int, typer.Option(metavar="N", min=1, help="Ranks to be started on each node.")
    ] = 1,
    together: Annotated[
        str | None,
        typer.Option(
            metavar="NODE=ADDRESS,...",
            help="All nodes of the job, where this runs on each of them: they are compared.",
            show_default="this machine alone",
        ),
    ] = None,
) -> None:
    """Check a node before training: GPUs, disks, /dev/shm, names, a product, its neighbours.

    Takes seconds, under a minute on many nodes. Exit code 1: this node is not fit, and it says
    why. The scripts in slurm/ run it before the ranks start and leave unfit nodes out.

    \b
    Example:
      longhaul preflight --run-dir runs/quickstart --ranks-per-node 4
    """  # noqa: D301
    import os
    import socket

    from train.cluster.preflight import check_node
    from train.quiet import quieten_libraries

    quieten_libraries()
    here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    found = check_node(run_dir, ranks_per_node)
    typer.echo(f"{here}: " + ", ".join(f"{each.name} {each.value}" for each in found if each.value))
    for each in found:
        if each.problem:
            typer.echo(f"{here}: unfit: {each.problem}", err=True)
    fit = not any(each.problem for each in found)
    if together is not None:
        from train.cluster.meeting import meet

        nodes = dict(pair.split("=", 1) for pair in together.split(","))
        fit = meet(run_dir, here, nodes, found, typer.echo)
    raise typer.Exit(0 if fit else 1)
