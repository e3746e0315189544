r"""The command `longhaul import`: a published model as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_model(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A Llama, Qwen2 or Mistral model: config.json, safetensors, tokenizer.json.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; it must not hold anything yet.")],
    segment_len: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="What `generate` and `evaluate` read at once. Training has its own.",
            show_default="4k, or the model's own limit where lower",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A tokenizers JSON file, or none.", show_default="the model's"
        ),
    ] = None,
) -> None:
    """Turn a published model's folder into a checkpoint, to continue or to measure.

    Reads safetensors only, one tensor at a time: memory is that of the largest. Weights become
    float32. A folder that `longhaul export` wrote comes back with its memory.

    \b
    Examples:
      longhaul import Llama-3.2-1B --output runs/llama
      longhaul prepare books/ --output shards --tokenizer runs/llama/tokenizer.json
      longhaul generate runs/llama --prompt story.txt

    Next: `longhaul pretrain` with the model section that this prints, model.init_from in it.
    """  # noqa: D301
    from train.quiet import quieten_libraries

    quieten_libraries()
    import yaml

    from train.huggingface.importing import import_folder
    from train.settings.units import parse_tokens

    try:
        length = None if segment_len is None else parse_tokens(segment_len)
    except ValueError as error:
        raise ValueError(f"--segment-len: {error}") from None
    done = import_folder(source, output, segment_len=length, tokenizer=tokenizer)
    config = done.opened.config
    typer.echo(
        f"{done.output}: {done.parameters:,} parameters, segments of"
        f" {config.data.segment_len:,} tokens"
    )
    if config.model.sliding_window is not None:
        typer.echo(
            f"sliding window: {config.model.sliding_window:,} tokens; segments, with the window of"
            " a memory, must not be longer, and then it cuts nothing"
        )
    model = {"init_from": str(done.output)}
    model |= config.model.model_dump(mode="json", exclude_defaults=True)
    section = yaml.safe_dump({"model": model}, sort_keys=False)
    typer.echo(
        f"the model of a run that continues it; add a memory, or adapters:\n\n{section}", nl=False
    )
