r"""The command `longhaul submit`: from a configuration to a job in SLURM's queue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from train.settings.config import Config


def submit(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The run's YAML file.", show_default=False)
    ],
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Nodes to train on.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE...", help="Values to change, by dotted key.", show_default=False
        ),
    ] = None,
    ranks_per_node: Annotated[
        int, typer.Option(metavar="N", min=1, help="Ranks on each node: its GPUs.")
    ] = 8,
    cpu: Annotated[bool, typer.Option("--cpu", help="Ranks without GPUs.")] = False,
    time: Annotated[
        str, typer.Option(metavar="TIME", help="Limit of one attempt, as SLURM writes it.")
    ] = "24:00:00",
    spare: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Nodes to ask for beside: unfit ones are left out."),
    ] = 0,
    lead: Annotated[
        int | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Warning before the time limit, to save in.",
            show_default="from the steps and saves that the run took, else 300",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Plan first, for a100, h100, h200 or a cluster's YAML file; refuse what does not"
            " fit.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Prove the layout in small on this machine first.")
    ] = False,
    partition: Annotated[str | None, typer.Option(help="SLURM's.", show_default=False)] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's.", show_default=False)] = None,
    qos: Annotated[str | None, typer.Option(help="SLURM's.", show_default=False)] = None,
    container: Annotated[
        str, typer.Option(metavar="IMAGE", help="With longhaul in it, run by pyxis.")
    ] = "",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="Any other of sbatch's: --option=--constraint=ib."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script; write and submit nothing.")
    ] = False,
) -> None:
    """Check a configuration for so many nodes, write its job script, and submit it.

    The script is RUN/job.sh. It works without this command, and again when the job has ended:
    the run goes on from its newest checkpoint. The job saves before its time limit and before it
    is preempted, requeues itself while it gets on, and leaves out nodes that fail.

    \b
    Examples:
      longhaul submit configs/pretrain_8b.yaml --nodes 8 --spare 1 --partition gpu
      longhaul submit configs/pretrain_8b.yaml --nodes 8 --gpu h100 --check
      longhaul submit configs/pretrain_8b.yaml train.steps=4000 --nodes 8 --dry-run

    Next: `squeue --me`; the log is NAME-JOB.out, the attempts are in RUN/attempts.jsonl.
    """  # noqa: D301
    import subprocess

    from train.cluster.submission import LIBRARY, Request, job_script, render
    from train.settings.config import load

    config = load(file, overrides or (), world_size=nodes * ranks_per_node)
    if not LIBRARY.exists():
        raise ValueError(
            f"{LIBRARY} is not in this folder, and the job script needs it; run longhaul submit in"
            " the repository's root, on a file system that all nodes see"
        )
    named = {"partition": partition, "account": account, "qos": qos}
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    request = Request(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus=not cpu,
        time=time,
        spare=spare,
        lead_s=lead,
        container=container,
        options=(*options, *(option or ())),
    )
    text = render(config, file, overrides or (), request)
    if gpu is not None:
        _plan(config, gpu, nodes, ranks_per_node)
    if check:
        _prove(config)
    for line in _missing(config):
        typer.echo(f"WARNING: {line}", err=True)
    if dry_run:
        typer.echo(text, nl=False)
        return
    script = job_script(config)
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(text)
    try:
        answer = subprocess.run(["sbatch", "--parsable", script], capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(
            f"there is no sbatch here; {script} is written: submit it where SLURM is"
        ) from None
    if answer.returncode:
        raise ValueError(f"SLURM refuses {script}: {answer.stderr.strip()}")
    job = answer.stdout.strip()
    typer.echo(f"job {job}: {script}, log {config.name}-{job}.out")


def _missing(config: Config) -> Iterator[str]:
    """Yield what the run reads and this machine does not see; the nodes may."""
    from data.shards import MANIFEST
    from data.urls import url_of

    shards = [("data.train", part.path) for part in config.corpora]
    shards += [("data.valid", config.data.valid)] if config.data.valid is not None else []
    for key, folder in shards:
        if url_of(folder) is None and not (folder / MANIFEST).is_file():
            yield (
                f"{key}: {folder} holds no prepared shards here; the job fails unless its nodes"
                " see them (`longhaul prepare` writes them)"
            )
    start = config.model.init_from
    if start is not None and not start.exists():
        yield f"model.init_from: {start} is not here; the job fails unless its nodes see it"


def _plan(config: Config, gpu: str, nodes: int, ranks_per_node: int) -> None:
    """Print what the run takes; raise ValueError where it does not fit."""
    from train.quiet import quieten_libraries

    quieten_libraries()
    from train.planning import load_cluster, plan
    from train.planning.vocabulary import vocab_size_of

    vocab_size = vocab_size_of(config, option="model.vocab_size=N")
    made = plan(config, load_cluster(gpu), nodes, ranks_per_node, vocab_size=vocab_size)
    for line in made.describe():
        typer.echo(line, err=True)
    if not made.memory.fits:
        raise ValueError(
            f"the run does not fit on {nodes} nodes of {ranks_per_node} ({gpu}); the plan above"
            " says what to shrink, `longhaul plan --choose` which layouts fit"
        )


def _prove(config: Config) -> None:
    """Run the layout in small beside one process; raise ValueError where they differ."""
    from train.checking import report
    from train.commands.check import run_check

    found = run_check(config, 4)
    typer.echo(report.as_text(found), err=True)
    if not found.passes:
        raise ValueError("the layout does not compute what one process does; see the check above")
