r"""The commands `longhaul checkpoint ls | verify | show | rm`: checkpoints, for people.

None of them imports torch. Lines `\b` in help texts: see train.cli.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from train.checkpoints.listing import Entry
    from train.checkpoints.manifest import Manifest

checkpoint = typer.Typer(
    name="checkpoint",
    help=(
        "List, verify, show and delete checkpoints.\n\n"
        "\b\n"
        "Examples:\n"
        "  longhaul checkpoint ls runs/quickstart\n"
        "  longhaul checkpoint verify runs/quickstart\n\n"
        "Next: `longhaul checkpoint show` says what one holds."
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead, for programs.")]
OneCheckpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A folder checkpoints/step-*, or a run's for its newest good one.",
        show_default=False,
    ),
]


@checkpoint.command()
def ls(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """List a run's checkpoints: which are good, why each is kept, where a resume goes on.

    Reads manifests and sizes only: `unverified` means that nobody hashed the files since they
    were written, `bad` that something is missing, cut or changed.

    \b
    Example:
      longhaul checkpoint ls runs/quickstart
    """  # noqa: D301
    from train.checkpoints.listing import checkpoints_folder, survey, table

    entries = survey(checkpoints_folder(run))
    typer.echo(json.dumps(_rows(entries), indent=1) if as_json else "\n".join(table(entries)))


@checkpoint.command()
def verify(
    what: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="A run's folder, for all of its checkpoints, or one of them.",
            show_default=False,
        ),
    ],
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Files read at once.", show_default="all cores"),
    ] = None,
) -> None:
    """Hash every file and compare it with what was written; exit code 1 if anything differs.

    What is found right is written down beside it, so that `ls` and retention need not hash it
    again until a file changes.

    \b
    Examples:
      longhaul checkpoint verify runs/quickstart
      longhaul checkpoint verify runs/quickstart/checkpoints/step-00000200
    """  # noqa: D301
    from data.wording import counted
    from train.checkpoints.listing import checkpoints_folder, describe_bytes, is_checkpoint
    from train.checkpoints.names import list_checkpoints

    chosen = [what] if is_checkpoint(what) else list_checkpoints(checkpoints_folder(what))
    workers = threads or os.cpu_count() or 1
    began, total, bad = time.perf_counter(), 0, 0
    for path in chosen:
        faults, num_bytes = _verify_one(path, workers)
        total, bad = total + num_bytes, bad + bool(faults)
        state = (
            f"good, {describe_bytes(num_bytes)}"
            if not faults
            else f"BAD, {counted(len(faults), 'fault')}"
        )
        typer.echo("\n  ".join([f"{path}: {state}", *faults]))
    seconds = time.perf_counter() - began
    typer.echo(
        f"{counted(len(chosen), 'checkpoint')}, {bad} bad;"
        f" {describe_bytes(total)} hashed in {seconds:.1f} s,"
        f" {total / 1e6 / max(seconds, 1e-9):,.0f} MB/s with {counted(workers, 'thread')}"
    )
    raise typer.Exit(1 if bad else 0)


@checkpoint.command()
def show(path: OneCheckpoint, as_json: JsonOption = False) -> None:
    """Say what a checkpoint holds: step, tokens, layout, versions, and the configuration.

    Of the configuration, what is not the default. --json prints the whole manifest.

    \b
    Examples:
      longhaul checkpoint show runs/quickstart
      longhaul checkpoint show runs/quickstart/checkpoints/step-00000200
    """  # noqa: D301
    from train.checkpoints.listing import (
        checkpoints_folder,
        inspect,
        is_checkpoint,
        resumed_from,
        survey,
    )
    from train.checkpoints.manifest import BadCheckpoint, read_manifest

    if not is_checkpoint(path):
        chosen = resumed_from(survey(checkpoints_folder(path)))
        if chosen is None:
            raise ValueError(f"{path} holds no good checkpoint; `longhaul checkpoint ls` says why")
        path = chosen.path
    try:
        manifest = read_manifest(path)
    except BadCheckpoint as error:
        raise ValueError(f"{error}; `longhaul checkpoint ls` lists the run's others") from error
    entry = inspect(path)
    typer.echo(json.dumps(_facts(entry, manifest), indent=1) if as_json else _text(entry, manifest))


@checkpoint.command()
def rm(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Folders checkpoints/step-*; step-*.bad and other leftovers too.",
            show_default=False,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even if fewer than two good ones remain.")
    ] = False,
) -> None:
    """Delete checkpoints, after asking. Two good ones of a run always remain.

    Those that remain are hashed first, where nobody did since they were written.

    \b
    Example:
      longhaul checkpoint rm runs/books/checkpoints/step-0000[1-4]*
    """  # noqa: D301
    from train.checkpoints.listing import describe_bytes, is_checkpoint
    from train.checkpoints.retention import check_removal, remove

    for path in paths:
        if not is_checkpoint(path):
            raise ValueError(f"{path} is not a checkpoint's folder (step-*); nothing was deleted")
    if not force:
        check_removal(paths)
    size = sum(file.stat().st_size for path in paths for file in path.rglob("*") if file.is_file())
    if not yes:
        typer.echo("\n".join(map(str, paths)))
        typer.confirm(f"Delete {len(paths)}, {describe_bytes(size)} in all?", abort=True)
    remove(paths)
    typer.echo(f"deleted {len(paths)}, {describe_bytes(size)}")


def _verify_one(path: Path, threads: int) -> tuple[list[str], int]:
    """Return a checkpoint's faults and how many bytes were hashed."""
    from train.checkpoints.manifest import (
        BadCheckpoint,
        find_faults,
        read_manifest,
        record_verified,
    )

    hashed: list[int] = []
    try:
        manifest = read_manifest(path)
    except BadCheckpoint as error:
        return [str(error)], 0
    faults = find_faults(path, manifest, threads=threads, hashed=hashed.append)
    if not faults:
        record_verified(path, manifest)
    return faults, sum(hashed)


def _rows(entries: list[Entry]) -> list[dict[str, Any]]:
    """Return what `ls` prints, for programs."""
    from train.checkpoints.listing import reasons, resumed_from

    kept, chosen = reasons(entries), resumed_from(entries)
    return [
        {
            "path": str(entry.path),
            "step": None if entry.manifest is None else entry.manifest.step,
            "saved": entry.saved,
            "bytes": entry.num_bytes,
            "layout": None if entry.manifest is None else entry.manifest.layout,
            "tokens": entry.tokens,
            "state": entry.state,
            "problem": entry.problem,
            "verified": entry.verified,
            "kept_because": kept[entry.path],
            "resumed": entry is chosen,
        }
        for entry in entries
    ]


def _facts(entry: Entry, manifest: Manifest) -> dict[str, Any]:
    """Return the manifest and what follows from it."""
    from dataclasses import asdict

    from train.checkpoints.listing import count_parameters, count_tokens

    return {
        "path": str(entry.path),
        "state": entry.state,
        "problem": entry.problem,
        "verified": entry.verified,
        "tokens": count_tokens(manifest),
        "num_parameters": count_parameters(manifest),
        "bytes": entry.num_bytes,
        "manifest": asdict(manifest),
    }


def _text(entry: Entry, manifest: Manifest) -> str:
    """Return a checkpoint's facts as lines."""
    from data.wording import counted
    from train.checkpoints import listing as say

    skipped = manifest.step - int(manifest.updates)
    size = manifest.config["data"]["sample_len"]
    rows = [
        ("state", entry.problem or say.describe_state(entry, time.time())),
        ("saved", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.saved))),
        ("step", f"{manifest.step:,}" + (f", {skipped:,} of them skipped" if skipped else "")),
        (
            "tokens",
            f"{say.count_tokens(manifest):,} ({counted(manifest.position, 'sample')} of {size:,})",
        ),
        (
            "parameters",
            f"{say.count_parameters(manifest):,} in {counted(len(manifest.parameters), 'tensor')}",
        ),
        (
            "size",
            f"{say.describe_bytes(entry.num_bytes)} in {counted(len(manifest.files), 'file')}",
        ),
        ("layout", say.describe_layout(manifest.layout)),
        ("data", f"corpus {manifest.data[:16]}, {manifest.vocab_size:,} tokens in its vocabulary"),
        ("versions", ", ".join(f"{name} {text}" for name, text in manifest.versions.items())),
    ]
    if (origin := manifest.parent) is not None:
        rows.append(("forked from", f"{origin['checkpoint']}, with {origin['keeps']} of it"))
    heading = "configuration, where it is not the default:"
    return "\n".join([str(entry.path), *say.aligned(rows), heading, _differences(manifest)])


def _differences(manifest: Manifest) -> str:
    """Return, as indented YAML, what a configuration has otherwise than the defaults."""
    import yaml

    from train.settings.config import ConfigError, validate

    try:
        values = validate(manifest.config).model_dump(mode="json", exclude_defaults=True)
    except ConfigError:  # of another version: then all of it
        values = manifest.config
    text = yaml.safe_dump(values, sort_keys=False)
    return "\n".join(f"  {line}" for line in text.splitlines())
