r"""The command `longhaul status`: where a run stands. It imports no torch."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
    watch: Annotated[bool, typer.Option("--watch", help="Print it anew until it ends.")] = False,
    every: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, help="With --watch.")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead, for programs.")] = (
        False
    ),
) -> None:
    """Say where a run stands: step, loss, speed, checkpoint, attempts, events, time left.

    Reads the run's files alone, so it works on any node that sees them, while the run goes on,
    and after it ended; then it says how it ended and what to do.

    \b
    Examples:
      longhaul status runs/books
      longhaul status runs/books --watch
      longhaul status runs/books --json

    Next: what it says to do, or `longhaul checkpoint ls RUN`.
    """  # noqa: D301
    from train.watch.status import describe, read_standing

    while True:
        standing = read_standing(run)
        if as_json:
            typer.echo(json.dumps(standing.to_json()))
        else:
            if watch and sys.stdout.isatty():
                typer.echo("\033[2J\033[H", nl=False)  # a clear screen, from its top
            typer.echo("\n".join(describe(standing)))
        if not watch or standing.state in ("finished", "failed", "hung", "stopped"):
            return
        time.sleep(every)
