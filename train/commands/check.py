r"""The command `longhaul check`: is this configuration's layout what one process computes?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from train.checking.check import Report
    from train.settings.config import Config


def check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The run's YAML file.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE...",
            help="Values to change, by dotted key: parallel.cp=4 parallel.zero=3.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Processes at most: TP, CP and DP get two each where they fit, CP four.",
        ),
    ] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Prove a configuration's layout on this machine, without a GPU and without data.

    Shrinks width, layers and length, keeps every switch (layout, ZeRO, packing, memory,
    checkpointing, precision, adapters), runs training's own code on CPU processes, and compares
    loss, each gradient and the weights after three steps with one plain process. Exits with 1 where
    they differ, and names the parameter and, by halving, the switch or switches that break it.

    \b
    Examples:
      longhaul check configs/pretrain_8b.yaml
      longhaul check configs/quickstart.yaml parallel.zero=3 parallel.attention=all_gather
      longhaul check FILE --json > check.json

    Next: docs/check.md says what it finds and what it cannot.
    """  # noqa: D301
    import json

    from train.settings.config import load

    found = run_check(load(file, overrides or ()), ranks)
    from train.checking import report

    if as_json:
        typer.echo(json.dumps(report.as_json(found), indent=2))
    else:
        typer.echo(report.as_text(found))
    raise typer.Exit(0 if found.passes else 1)


def run_check(config: Config, ranks: int) -> Report:
    """Return what the check of a configuration finds, with progress on standard error."""
    from train.quiet import quieten_libraries

    # On the CPU whatever the machine has: processes are forked, which a used GPU forbids.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    quieten_libraries()
    from train.checking.check import check as run

    return run(config, ranks, lambda line: typer.echo(line, err=True))
