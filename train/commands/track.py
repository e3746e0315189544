r"""The commands `longhaul track sync | ui`: a run's MLflow side, after the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

track = typer.Typer(
    name="track",
    help=(
        "Ship what a tracking server missed, and look at a run's own store.\n\n"
        "\b\n"
        "Examples:\n"
        "  longhaul track sync runs/books\n"
        "  longhaul track ui runs/books"
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
)

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)
]


@track.command()
def sync(
    run: RunFolder,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=1.0, help="Try for so long.")
    ] = 600.0,
) -> None:
    """Send what MLflow has not got yet, into the same run.

    A run does this by itself while it trains, and for a minute after. Exit code 1 where something
    is left: it says why, and the same command tries again. What was sent already stays single.

    \b
    Example:
      longhaul track sync runs/books
    """  # noqa: D301
    from train.tracking.replay import replay

    left = replay(run, timeout)
    typer.echo(left.describe())
    raise typer.Exit(0 if left.num_bytes == 0 else 1)


@track.command()
def ui(
    run: RunFolder,
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="To listen at.")] = "127.0.0.1",
) -> None:
    """Open MLflow on the store in a run's folder, until Ctrl-C.

    A run that logged to a server has no store of its own: its page there is printed instead.

    \b
    Example:
      longhaul track ui runs/quickstart     # then http://127.0.0.1:5000
    """  # noqa: D301
    from train.tracking.replay import open_ui

    raise typer.Exit(open_ui(run, host, port, typer.echo))
