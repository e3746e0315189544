"""`longhaul evaluate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from train.commands.arguments import token_option
from train.commands.generate import ChangesOption


def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A checkpoint folder, or a run folder for its newest good one.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Prepared shards to read.",
            show_default="the run's data.valid",
        ),
    ] = None,
    memory: Annotated[
        Literal["on", "off"],
        typer.Option(
            help="on measures with the memory, without it, and with that of another document,"
            " for the differences; off only without.",
        ),
    ] = "on",
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Stop after this many tokens, such as 1M.",
            show_default="all of them",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Also write a report: one HTML page, and JSON and a picture beside it. A file"
            " such as report.html, or a folder.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Also ask questions whose answer lies far back: passkey,recall,facts,pubmedqa"
            " (facts are story_person,story_thing,story_yes_no,story_count).",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTHS",
            help="Tokens before the tasks' questions: 1k,4k,16k.",
            show_default="4 and 16 segments",
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option(metavar="N", min=1, help="Questions for each length and place.")
    ] = 32,
    pubmedqa: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="PubMedQA's ori_pqal.json and test_ground_truth.json."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the tasks' questions.")] = 0,
    track: Annotated[
        bool, typer.Option("--track", help="Also log to the MLflow run of the checkpoint.")
    ] = False,
    changes: ChangesOption = None,
) -> None:
    """Measure a checkpoint's loss by position in the document, and whether its memory is used.

    Loss that goes on falling far into a document, and is higher with the memory of another
    document, is a memory at work. Prints a table and the verdict, with a warning on stderr where
    the memory is not used; writes only what you name.

    \b
    Examples:
      longhaul evaluate runs/quickstart
      longhaul evaluate runs/quickstart --tokens 1M --output report.html
      longhaul evaluate runs/books --tasks passkey,recall --lengths 1k,4k --output report.html

    Next: compare with a run of model.memory.name=none at the same number of tokens.
    """  # noqa: D301
    limit = None if tokens is None else token_option("--tokens", tokens)
    distances = [token_option("--lengths", text) for text in _listed(lengths)]
    from parallel.heap import settle_heap
    from train.quiet import quieten_libraries

    settle_heap()
    quieten_libraries()
    from train.evaluation.evaluate import Tasks, run

    code = run(
        checkpoint,
        data=data,
        memory=memory == "on",
        tokens=limit,
        output=output,
        tasks=Tasks(_listed(tasks), distances, prompts=prompts, seed=seed, pubmedqa=pubmedqa),
        track=track,
        changes=changes or (),
    )
    raise typer.Exit(code)


def _listed(text: str | None) -> list[str]:
    """Return the parts of a list with commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]
