r"""The command `longhaul convert-mfu`: published speeds on longhaul's basis."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def convert_mfu(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A configuration with the model's shape.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Values to change.", show_default=False),
    ] = None,
    tokens_per_s: Annotated[
        float | None, typer.Option(metavar="N", help="Tokens a second of one GPU.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(metavar="N", help="TFLOP/s of one GPU, by --basis.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(metavar="SHARE", help="MFU by --basis, such as 0.39.")
    ] = None,
    basis: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="How they count: causal, full (attention as a whole square), 6n."
        ),
    ] = "full",
    recomputed: Annotated[
        bool, typer.Option("--recomputed", help="They count what checkpointing computes again.")
    ] = False,
    length: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Full attention over so many tokens, such as 128k.",
            show_default="FILE's memory and segment_len",
        ),
    ] = None,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="a100, h100, h200, or a cluster's YAML file.")
    ] = "h100",
    vocab_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens, where model.vocab_size is left out.",
            show_default="data.train's, where that lies here",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put a published speed on the basis of longhaul's own MFU, so that the two compare.

    Give one of --tokens-per-s, --tflops and --mfu; all of one GPU.

    \b
    Examples:
      longhaul convert-mfu configs/pretrain_8b.yaml --length 8k --tokens-per-s 6667
      longhaul convert-mfu configs/pretrain_8b.yaml --length 8k --mfu 0.39 --basis full
      longhaul convert-mfu configs/pretrain_8b.yaml --length 1M --tflops 576 --recomputed

    Next: `longhaul plan`, for the same model in a layout of your own.
    """  # noqa: D301
    from train.quiet import quieten_libraries

    quieten_libraries()
    from model.config import NoMemory
    from train.build import to_model_config
    from train.planning.cluster import load_cluster
    from train.planning.vocabulary import vocab_size_of
    from train.settings.config import load
    from train.settings.remedies import did_you_mean
    from train.settings.units import parse_tokens
    from train.speed.converted import BASES, convert
    from train.speed.metrics import Peak

    if basis not in BASES:
        hint = did_you_mean(basis, BASES)
        raise ValueError(f"--basis {basis}: known are {', '.join(BASES)}{hint}")
    config = load(file, overrides or ())
    vocab = vocab_size_of(config, vocab_size)
    model, segment_len = to_model_config(config, vocab), config.data.segment_len
    if length is not None:
        model, segment_len = replace(model, memory=NoMemory()), parse_tokens(length)
    cluster = load_cluster(gpu)
    peak = Peak(cluster.device.peak_bf16, cluster.name)
    found = convert(
        model,
        segment_len,
        peak,
        basis,
        recomputed=recomputed,
        tokens_per_s=tokens_per_s,
        tflops=tflops,
        mfu=mfu,
    )
    if as_json:
        typer.echo(json.dumps(found._asdict()))
        return
    again = ", with what is computed again" if recomputed else ""
    typer.echo(f"{found.tokens_per_s:,.1f} tokens/s on one {cluster.name}")
    typer.echo(
        f"theirs: {found.theirs_flops / 1e12:,.1f} TFLOP/s, MFU {found.theirs_mfu:.1%}"
        f" ({BASES[basis]}{again})"
    )
    typer.echo(
        f"ours:   {found.ours_flops / 1e12:,.1f} TFLOP/s, MFU {found.ours_mfu:.1%}"
        f" ({BASES['causal']})"
    )
