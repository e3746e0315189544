r"""The command line: `longhaul prepare | pretrain | config | evaluate | generate | import | ...`.

Only what parsing needs is imported here; torch and the rest load inside the commands, so that
help and configuration errors come at once. What a user did wrong is one message on stderr
and exit code 2, never a traceback. In help texts, a line `\b` keeps the next block's lines
apart (so D301, raw docstrings, does not fit: the character itself must be there).
"""

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from train.cluster.failure import REFUSED, tell_launcher
from train.commands.check import check
from train.commands.checkpoint import checkpoint
from train.commands.config import config
from train.commands.convert_mfu import convert_mfu
from train.commands.data import data
from train.commands.evaluate import evaluate
from train.commands.export import export_model
from train.commands.generate import generate
from train.commands.import_model import import_model
from train.commands.miniature import miniature
from train.commands.plan import plan
from train.commands.preflight import preflight
from train.commands.prepare import prepare
from train.commands.pretrain import pretrain
from train.commands.status import status
from train.commands.submit import submit
from train.commands.track import track
from train.starting.provenance import check_provenance, is_ours

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="longhaul",
    help=(
        "Pretrain language models on documents longer than a device holds.\n\n"
        "Begin on a laptop, in three commands:\n\n"
        "\b\n"
        "  longhaul prepare stdlib --output runs/quickstart-data --valid-fraction 0.1\n"
        "  longhaul pretrain configs/quickstart.yaml parallel.tp=1 parallel.cp=1\n"
        "  longhaul evaluate runs/quickstart\n\n"
        "On several ranks:\n\n"
        "\b\n"
        "  torchrun --standalone --no-python --nproc-per-node 4 longhaul pretrain FILE"
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain text: the same in a terminal and in a job's log
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"longhaul {version('longhaul')}")
        raise typer.Exit


@app.callback()
def _options_of_all(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    pass


app.command()(prepare)
app.command()(pretrain)
app.command()(config)
app.command()(evaluate)
app.command()(check)
app.command("convert-mfu")(convert_mfu)
app.command()(generate)
app.command("import")(import_model)
app.command("export")(export_model)
app.command()(miniature)
app.command()(plan)
app.command()(preflight)
app.command()(submit)
app.command()(status)
app.add_typer(data, name="data")
app.add_typer(checkpoint)
app.add_typer(track)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    try:
        check_provenance()
        app(prog_name="longhaul")
    except Exception as error:
        tell_launcher(error)
        if not (isinstance(error, ValueError) and is_ours(error)):
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            typer.echo(f"{error}", err=True)
        elif type(error).__name__ != "ConfigError" or os.environ.get("LOCAL_RANK") == "0":
            # Ranks of a node find the same problems in the same files, and once is enough to
            # read; once ranks run, an error can be one rank's own: say whose.
            typer.echo(f"[rank {rank}] {error}", err=True)
        sys.exit(REFUSED)
