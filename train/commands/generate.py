r"""The command `longhaul generate`: a prompt of any length, continued."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

ChangesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Let the memory do otherwise than in training: retrieve=4 (landmark), beta=8 (latch).",
    ),
]


def generate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint's folder, or a run's.", show_default=False
        ),
    ],
    prompt: Annotated[
        str,
        typer.Option(metavar="FILE", help="The text to continue; - reads standard input."),
    ] = "-",
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to write at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; 1 samples as learned.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the likeliest tokens that hold P.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the sampling.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Stop before this text; repeat for several."),
    ] = None,
    context: Annotated[
        Literal["truncate", "homer"] | None,
        typer.Option(
            help="For models without memory and a prompt longer than a segment: its end only, or"
            " all of it by hierarchical merging, shown beside its end only.",
            show_default="an error",
        ),
    ] = None,
    changes: ChangesOption = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The run's tokenizer.", show_default="the data's"),
    ] = None,
) -> None:
    """Continue a text of any length with a checkpoint; the text goes to stdout.

    The prompt is read segment by segment through the model's memory, so memory stays bounded
    however long it is. A model without memory reads one segment at most; under torchrun its ranks
    share the keys out. Speed and state size go to stderr.

    \b
    Examples:
      longhaul generate runs/quickstart --prompt book.txt --max-tokens 200 --temperature 0.8
      cat *.py | longhaul generate runs/quickstart --top-p 0.9 --stop 'def '
      torchrun --no-python --nproc-per-node 4 longhaul generate runs/plain --prompt book.txt
    """  # noqa: D301
    from parallel.heap import settle_heap
    from train.quiet import quieten_libraries

    settle_heap()
    quieten_libraries()
    from model.sampling import Sampling
    from train.generation.generate import run
    from train.generation.writing import Wanted

    wanted = Wanted(max_tokens, Sampling(temperature, top_p, seed), tuple(stop or ()))
    code = run(
        checkpoint,
        prompt,
        wanted,
        context=context,
        tokenizer=tokenizer,
        changes=changes or (),
    )
    raise typer.Exit(code)
