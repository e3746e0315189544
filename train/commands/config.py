"""`longhaul config`."""

from pathlib import Path
from typing import Annotated

import typer

from train.commands.arguments import Overrides


def config(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="The run's YAML file.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON schema instead, with the help of every key."),
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Check that it fits this many ranks, too."),
    ] = None,
) -> None:
    """Check a configuration and print it complete, defaults and overrides included.

    Writes nothing, needs no GPU and no data: try a cluster's file on a laptop. The output is
    a configuration file itself. Lengths take k and M (32k = 32768 tokens), durations s, min, h.

    \b
    Examples:
      longhaul config configs/quickstart.yaml train.steps=50
      longhaul config configs/pretrain_8b.yaml --world-size 64
      longhaul config --schema > longhaul.schema.json

    Next: give the schema to your editor (yaml-language-server completes and explains keys), and
    the file to `longhaul pretrain`.
    """  # noqa: D301
    import json

    from data.wording import counted
    from train.settings.config import dump, load
    from train.settings.config import schema as config_schema

    if schema:
        typer.echo(json.dumps(config_schema(), indent=2))
        return
    if file is None:
        raise ValueError("name a configuration FILE, or ask for --schema")
    resolved = load(file, overrides or (), world_size=world_size)
    tokens = resolved.train.batch_size * resolved.data.sample_len
    typer.echo(
        f"# a step: {resolved.train.batch_size} lanes x {resolved.num_segments} segments of"
        f" {resolved.data.segment_len} tokens = {tokens:,} tokens;"
        f" {resolved.train.steps:,} steps = {tokens * resolved.train.steps:,} tokens"
    )
    if world_size is not None:
        tp, cp = resolved.parallel.tp, resolved.parallel.cp
        typer.echo(
            f"# {counted(world_size, 'rank')}: tp {tp} x cp {cp} x dp {world_size // (tp * cp)}"
        )
    typer.echo(dump(resolved), nl=False)
