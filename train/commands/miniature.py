r"""The command `longhaul miniature`: a paper's headline result in small, trained and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SeedOption = Annotated[
    list[int] | None,
    typer.Option("--seed", help="Run this seed only; repeat for several.", show_default="all"),
]


def miniature(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILES...", help="Miniatures: YAML files.", show_default=False),
    ],
    seed: SeedOption = None,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where weights go, a folder for each name.")
    ] = Path("runs/miniatures"),
    results: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Where results go and are: NAME/seed-N.json."),
    ] = Path("docs/results/miniatures"),
    table: Annotated[
        bool,
        typer.Option("--table", help="Train nothing: print the table of all results so far."),
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --table: write a plot, too.")
    ] = None,
) -> None:
    """Train a paper's headline result in small, and check it to a million tokens.

    One core, minutes of training, then a streaming check at every length and key position. Each
    seed's result is written as JSON; finished seeds are not run again, a killed one is begun anew.
    The results that docs/results.md shows are in the repository: to run such a seed yourself, give
    another folder for --results.

    \b
    Examples:
      longhaul miniature configs/miniatures/fam.yaml --seed 0 --results my-results
      longhaul miniature configs/miniatures/*.yaml --table --picture miniatures.png
    """  # noqa: D301
    from train.quiet import quieten_libraries

    quieten_libraries()
    from train.miniatures.config import load_miniature

    if picture is not None and not table:
        raise ValueError(f"--picture {picture} belongs to --table; give both")
    loaded = [load_miniature(path) for path in files]
    if table:
        from train.miniatures import report

        typer.echo(report.table(results, loaded), nl=False)
        if picture is not None:
            report.plot(results, loaded, picture)
        return
    import torch

    from train.miniatures.trainer import run_seed

    torch.set_num_threads(1)
    for each in loaded:
        for number in each.seeds if seed is None else seed:
            folder = output / each.name / f"seed-{number}"
            typer.echo(f"{each.name}, seed {number} -> {folder}")
            run_seed(each, number, folder, results, lambda line: typer.echo(f"  {line}"))
