r"""The command `longhaul plan`: memory, time and layouts of a run before it is queued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from train.planning.dryrun import DryRun
    from train.settings.config import Config


def plan(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="The run's YAML file.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Values to change.", show_default=False),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Nodes of the job.")] = 1,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ranks of a node.", show_default="the cluster's"),
    ] = None,
    gpu: Annotated[
        str,
        typer.Option(metavar="NAME", help="Cluster: a100, h100, h200, or a YAML file of your own."),
    ] = "h100",
    choose: Annotated[
        bool, typer.Option("--choose", help="Look at all layouts; rank those that fit by time.")
    ] = False,
    segments: Annotated[
        bool, typer.Option("--segments", help="With --choose: half and twice segment_len, too.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Put the fastest layout into FILE (--choose).")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Also run the real model on fake tensors, as some ranks."),
    ] = False,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens, where model.vocab_size is left out.",
            show_default="data.train's, where that lies here",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure this machine; write its description there."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run takes before it is queued: memory by part, time, days, and what fits.

    Nothing is started and no GPU is needed. The numbers come from the configuration and from a
    description of the cluster; docs/plan.md says how near they are.

    \b
    Examples:
      longhaul plan configs/pretrain_8b.yaml --nodes 8 --gpu h200
      longhaul plan configs/pretrain_8b.yaml --nodes 8 --choose --write
      longhaul plan configs/pretrain_8b.yaml --nodes 64 --dry-run train.batch_size=256
      longhaul plan --calibrate my-cluster.yaml

    Exits 1 where the run does not fit. Next: `longhaul config`, or queue it.
    """  # noqa: D301
    from train.quiet import quieten_libraries

    quieten_libraries()
    if calibrate is not None:
        from train.planning.calibrate import calibrate as measure

        for line in measure(calibrate):
            typer.echo(line)
        return
    if file is None:
        raise ValueError("name a configuration FILE, or ask for --calibrate")
    if write and not choose:
        raise ValueError("--write puts in what --choose finds; give both")
    from train.planning.cluster import load_cluster
    from train.planning.vocabulary import vocab_size_of
    from train.settings.config import ConfigError, load

    cluster = load_cluster(gpu)
    ranks = gpus or cluster.per_node
    world = nodes * ranks
    try:
        config = load(file, overrides or (), world_size=None if choose else world)
    except ConfigError as error:
        load(file, overrides or ())  # raises what has nothing to do with ranks
        raise ValueError(f"{error}\n{_assumed(cluster.name, nodes, ranks, gpus)}") from None
    vocab = vocab_size_of(config, vocab_size)
    if choose:
        _choose(config, cluster, nodes, ranks, vocab, segments, file if write else None, as_json)
        return
    from train.planning.plan import plan as make_plan

    made = make_plan(config, cluster, nodes, ranks, vocab_size=vocab)
    runs = _dry_runs(config, world, vocab) if dry_run else []
    if as_json:
        told: dict[str, Any] = made.as_dict()
        if runs:
            told["dry_run"] = [_as_dict(run) for run in runs]
        typer.echo(json.dumps(told, indent=2))
    else:
        for line in made.describe():
            typer.echo(line)
        for run in runs:
            for line in run.describe():
                typer.echo(line)
        if runs:
            work = (
                sum(
                    made.memory.parts[name]
                    for name in ("layers", "memory graph", "one layer", "ring messages", "logits")
                )
                + made.memory.one_state
            )
            most = max(run.peak.total for run in runs)
            typer.echo(f"estimate of what the dry run counts: {work / most - 1:+.1%}")
    if not made.memory.fits:
        raise typer.Exit(1)


def _assumed(cluster: str, nodes: int, ranks: int, gpus: int | None) -> str:
    """Return for which ranks a configuration was checked."""
    from data.wording import counted

    why = f"as a node of {cluster} has" if gpus is None else "by --gpus"
    return (
        f"planned for {counted(nodes, 'node')} of {counted(ranks, 'rank')}, {why};"
        " give --nodes and --gpus of your own, or --choose to look at all layouts"
    )


def _choose(
    config: Config,
    cluster: Any,
    nodes: int,
    ranks: int,
    vocab: int,
    segments: bool,
    target: Path | None,
    as_json: bool,
) -> None:
    from train.planning.choose import choose
    from train.planning.rewrite import rewrite

    found = choose(config, cluster, nodes, ranks, vocab_size=vocab, segments=segments)
    if as_json:
        rows = [{"changes": c.changes} | c.plan.as_dict() for c in found.ranked[:20]]
        typer.echo(json.dumps({"valid": found.valid, "fit": len(found.ranked), "best": rows}))
    else:
        for line in found.describe(10):
            typer.echo(line)
    if not found.ranked:
        raise typer.Exit(1)
    if target is not None:
        best = found.ranked[0].changes
        target.write_text(rewrite(target.read_text(encoding="utf-8"), best), encoding="utf-8")
        typer.echo(f"{target}: {found.ranked[0].words()}", err=True)


def _dry_runs(config: Config, world: int, vocab: int) -> list[DryRun]:
    from train.planning.dryrun import distinct_ranks, dry_run
    from train.planning.shapes import shapes_of

    found = []
    for rank in distinct_ranks(shapes_of(config, world)):
        typer.echo(f"dry run of rank {rank} of {world} ...", err=True)
        found += dry_run(config, world, vocab, [rank])
    return found


def _as_dict(run: DryRun) -> dict[str, Any]:
    messages = [message._asdict() | {"count": n} for message, n in sorted(run.messages.items())]
    return {
        "rank": run.rank,
        "parameters": run.parameters,
        "kept": run.kept.parts,
        "peak": run.peak.parts,
        "messages": messages,
    }
