r"""The command `longhaul export`: a checkpoint as a folder for `transformers`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)


def export_model(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint's folder, or a run's.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            help="Folder to write; it must not hold anything yet.",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        Literal["bf16", "fp32"],
        typer.Option(help="Of the weights. fp32 is what training holds, at twice the size."),
    ] = "bf16",
    max_shard: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file of weights, such as 5GB or 500MB.")
    ] = "5GB",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The run's tokenizer, as a file or in a folder, or none.",
            show_default="the imported model's, or the data's",
        ),
    ] = None,
) -> None:
    """Write a checkpoint as a folder that transformers loads: safetensors, config, tokenizer.

    A checkpoint of any layout, one parameter in memory at a time. Without a memory the logits are
    the same, but for the rounding of --dtype. A memory stands beside the base weights, in
    memory.json and memory.safetensors; the README.md that is written has code that loads it.

    \b
    Examples:
      longhaul export runs/books books-1b
      longhaul export runs/books/checkpoints/step-00001000 books-1b-fp32 --dtype fp32

    Next: AutoModelForCausalLM.from_pretrained("OUTPUT"), or `longhaul import OUTPUT`.
    """  # noqa: D301
    size = parse_size(max_shard)
    from train.quiet import quieten_libraries

    quieten_libraries()
    from train.huggingface.exporting import export

    done = export(checkpoint, output, dtype=dtype, max_shard_bytes=size, tokenizer=tokenizer)
    files = "1 file" if done.files == 1 else f"{done.files} files"
    typer.echo(
        f"{done.output}: {done.checkpoint}, {done.total_bytes:,} bytes of weights in {files}"
    )
    if done.memory:
        typer.echo(f"memory.safetensors: {done.memory:,} parameters of the memory")


def parse_size(text: str) -> int:
    """Return the bytes that `5GB`, `500 MB` or `2GiB` are. Raises ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--max-shard: expected a size such as 5GB or 500MB, got {text!r}")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** " KMGT".index(match[2].upper() or " "))
