r"""The commands `longhaul data ...`: what runs did with their data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(help="Look at what runs did with their data.", no_args_is_help=True)


@data.callback()
def _group() -> None:
    """Look at what runs did with their data."""


@data.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="OTHER", help="Another to compare with.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say whether a run consumed every sample exactly once, and as another run did.

    Reads the ledgers that runs keep of every sample's position and hash, whatever ranks, workers
    and restarts there were. Exit code 0: all is well; 1: something is missing, came twice or
    differs, and it says what.

    \b
    Examples:
      longhaul data verify runs/books
      longhaul data verify runs/books runs/books-undisturbed --json
    """  # noqa: D301
    import json

    from train.quiet import quieten_libraries

    quieten_libraries()
    from train.reading.verify import verify as verify_runs

    found = verify_runs([run] if other is None else [run, other])
    typer.echo(json.dumps(found.values, indent=1) if as_json else "\n".join(found.sentences))
    raise typer.Exit(0 if found.good else 1)
