"""`longhaul prepare`."""

from pathlib import Path
from typing import Annotated

import typer

from train.commands.arguments import token_option


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
    tokens = token_option("--shard-tokens", shard_tokens)
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
