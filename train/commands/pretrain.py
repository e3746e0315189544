"""`longhaul pretrain`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from train.commands.arguments import ConfigFile, Overrides

if TYPE_CHECKING:
    from train.settings.config import Config


def pretrain(
    file: ConfigFile,
    overrides: Overrides = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Begin again: an existing run folder is set aside under a dated name."
            " Without it, a run goes on from its newest good checkpoint.",
        ),
    ] = False,
    fork: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Begin a new run, in a folder of this name beside this one, from its newest good"
            " checkpoint: for what cannot change in the middle of a run. This one stays as it is.",
        ),
    ] = None,
    print_run_dir: Annotated[
        bool,
        typer.Option(
            "--print-run-dir",
            help="Print the folder that this command writes, and do nothing: for job scripts.",
        ),
    ] = False,
) -> None:
    """Train a model, or go on where its run stopped.

    Everything is checked before any rank starts, and every problem is told at once. The run
    folder (run_dir, else runs/<name>) gets the resolved configuration, checkpoints and metrics.
    The same command resumes: after a crash or a preemption, and a finished run with more steps.
    Changed keys are named, and refused where they would make another run of it: see --fork.

    \b
    Examples:
      longhaul pretrain configs/quickstart.yaml parallel.tp=1 parallel.cp=1
      torchrun --standalone --no-python --nproc-per-node 4 longhaul pretrain configs/quickstart.yaml
      longhaul pretrain FILE model.memory.name=none name=without_memory
      longhaul pretrain FILE data.train=books/train --fork on_books

    Next: `longhaul evaluate runs/<name>`, or look at MLflow; `longhaul config` explains keys.
    """  # noqa: D301
    if print_run_dir:
        from train.settings.config import load
        from train.starting.fork_name import name_fork

        config = load(file, overrides or (), world_size=None)
        typer.echo((config if fork is None else name_fork(config, fork)[0]).run_dir)
        return
    config = _load_for_ranks(file, overrides or (), fresh=fresh, fork=fork)
    if fresh and fork is not None:
        raise ValueError(f"--fresh and --fork {fork} exclude each other; give one")
    from train.quiet import quieten_libraries
    from train.signals import StopRequest, follow_launcher
    from train.starting.fresh import begun_before

    fresh = fresh and not begun_before(config.run_dir)
    stop = StopRequest()  # before torch is imported, which takes seconds: no signal is lost
    follow_launcher()
    quieten_libraries()
    from train.pretrain import run

    raise typer.Exit(run(config, fresh=fresh, fork=fork, stop=stop))


def _load_for_ranks(
    file: Path, overrides: Sequence[str], *, fresh: bool, fork: str | None
) -> "Config":
    """Return the configuration of these ranks; where one was started for several, say how to."""
    from train.settings.config import ConfigError, load
    from train.starting.again import launch_command

    world_size = os.environ.get("WORLD_SIZE")
    try:
        return load(file, overrides, world_size=int(world_size or 1))
    except ConfigError as error:
        if world_size is not None:
            raise
        parallel = load(file, overrides).parallel  # raises what has nothing to do with ranks
        words = ["pretrain", str(file), *overrides, *(["--fresh"] if fresh else [])]
        words += ["--fork", fork] if fork is not None else []
        command = launch_command(parallel.tp * parallel.cp, *words)
        raise ValueError(f"{error}\nstart them with:\n  {command}") from None
