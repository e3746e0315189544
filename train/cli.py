r"""The command line: `longhaul prepare | pretrain | config | evaluate | generate | import | ...`.

Only what parsing needs is imported here; torch and the rest load inside the commands, so that
help and configuration errors come at once. What a user did wrong is one message on stderr
and exit code 2, never a traceback. In help texts, a line `\b` keeps the next block's lines
apart (so D301, raw docstrings, does not fit: the character itself must be there).
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from train.cluster.failure import REFUSED, tell_launcher
from train.commands.check import check
from train.commands.checkpoint import checkpoint
from train.commands.convert_mfu import convert_mfu
from train.commands.data import data
from train.commands.export import export_model
from train.commands.generate import ChangesOption, generate
from train.commands.import_model import import_model
from train.commands.miniature import miniature
from train.commands.plan import plan
from train.commands.preflight import preflight
from train.commands.status import status
from train.commands.submit import submit
from train.commands.track import track
from train.starting.provenance import check_provenance, is_ours

if TYPE_CHECKING:
    from train.settings.config import Config

app = typer.Typer(
    name="longhaul",
    help=(
        "Pretrain language models on documents longer than a device holds.\n\n"
        "Begin on a laptop, in three commands:\n\n"
        "\b\n"
        "  longhaul prepare stdlib --output runs/quickstart-data --valid-fraction 0.1\n"
        "  longhaul pretrain configs/quickstart.yaml parallel.tp=1 parallel.cp=1\n"
        "  longhaul evaluate runs/quickstart\n\n"
        "On several ranks:\n\n"
        "\b\n"
        "  torchrun --standalone --no-python --nproc-per-node 4 longhaul pretrain FILE"
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain text: the same in a terminal and in a job's log
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"longhaul {version('longhaul')}")
        raise typer.Exit


@app.callback()
def _options_of_all(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    pass


ConfigFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="The run's YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE...",
        help="Values to change, by dotted key: train.steps=50 data.segment_len=32k.",
        show_default=False,
    ),
]


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUTS...",
            help="Files or folders of text, JSONL or parquet, plain or compressed; or the word"
            " stdlib for this Python's own library, a corpus that needs no download.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="Folder to write: it gets train/, valid/ and the tokenizer."),
    ],
    tokenizer: Annotated[
        str, typer.Option(help="bytes (nothing to train or fetch), or a tokenizers JSON file.")
    ] = "bytes",
    train_tokenizer: Annotated[
        int | None,
        typer.Option(
            metavar="VOCAB",
            help="Train a tokenizer of this many tokens on a sample of the inputs instead.",
        ),
    ] = None,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of the documents kept for validation.")
    ] = 0.01,
    shard_tokens: Annotated[
        str, typer.Option(metavar="TOKENS", help="Tokens in a shard, such as 16M.")
    ] = "16M",
    workers: Annotated[
        int | None, typer.Option(help="Processes that tokenize.", show_default="all cores")
    ] = None,
    text_key: Annotated[
        str, typer.Option(help="Key or column with the text, for JSONL and parquet.")
    ] = "text",
    force: Annotated[bool, typer.Option("--force", help="Replace what output holds.")] = False,
) -> None:
    """Turn text into shards of tokens, once, before training.

    Writes WebDataset shards with an index and a manifest (hashes, counts, the tokenizer), so
    that training finds damage and resumes at any sample. The same inputs give the same shards,
    and the same command goes on where it was stopped.

    \b
    Examples:
      longhaul prepare stdlib --output runs/quickstart-data --valid-fraction 0.1
      longhaul prepare books/ papers.jsonl.zst --output shards --train-tokenizer 32000

    Next: set data.train to OUTPUT/train and data.valid to OUTPUT/valid, then
    `longhaul pretrain`.
    """  # noqa: D301
    if train_tokenizer is not None and tokenizer != "bytes":
        raise ValueError(
            f"--tokenizer {tokenizer} and --train-tokenizer {train_tokenizer} exclude each"
            " other; give one"
        )
    tokens = _token_option("--shard-tokens", shard_tokens)
    from data.prepare import prepare as write_shards
    from data.tokenizer import TokenizerTraining, load_tokenizer

    done = write_shards(
        inputs,
        output,
        tokenizer=(
            load_tokenizer(tokenizer)
            if train_tokenizer is None
            else TokenizerTraining(vocab_size=train_tokenizer)
        ),
        valid_fraction=valid_fraction,
        shard_tokens=tokens,
        workers=workers,
        text_key=text_key,
        force=force,
    )
    for line in done.lines():
        typer.echo(line)
    for line in done.warnings():
        typer.echo(f"WARNING: {line}", err=True)


@app.command()
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


@app.command()
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


@app.command()
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
    limit = None if tokens is None else _token_option("--tokens", tokens)
    distances = [_token_option("--lengths", text) for text in _listed(lengths)]
    from train.quiet import quieten_libraries

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


app.command()(check)
app.command("convert-mfu")(convert_mfu)
app.command()(generate)
app.command("import")(import_model)
app.command("export")(export_model)
app.command()(miniature)
app.command()(plan)
app.command()(preflight)
app.command()(submit)
app.command()(status)
app.add_typer(data, name="data")
app.add_typer(checkpoint)
app.add_typer(track)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    try:
        check_provenance()
        app(prog_name="longhaul")
    except Exception as error:
        tell_launcher(error)
        if not (isinstance(error, ValueError) and is_ours(error)):
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            typer.echo(f"{error}", err=True)
        elif type(error).__name__ != "ConfigError" or os.environ.get("LOCAL_RANK") == "0":
            # Ranks of a node find the same problems in the same files, and once is enough to
            # read; once ranks run, an error can be one rank's own: say whose.
            typer.echo(f"[rank {rank}] {error}", err=True)
        sys.exit(REFUSED)


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


def _listed(text: str | None) -> list[str]:
    """Return the parts of a list with commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _token_option(option: str, text: str) -> int:
    from train.settings.units import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
