"""Which run is started: a new one, one to go on with, one begun again, or a fork of another."""

from __future__ import annotations

import hashlib
import os
import sys

import torch.distributed as dist

from train.reading import model_vocab_size
from train.settings.config import Config, dump
from train.starting.fork import Data, begin_fork, plan_fork
from train.starting.fresh import begin_again
from train.starting.inputs import Inputs, open_inputs


def open_run(
    config: Config, *, fresh: bool = False, fork: str | None = None
) -> tuple[Config, Inputs]:
    """Return the run's configuration and its corpora; rank 0 prepares its folder.

    fresh: begin again, an old folder gets another name. fork: the name of a new run that begins
    from this one's newest checkpoint. Every rank calls this, before it meets the others. Raises
    ConfigError with every problem of data and checkpoint.
    """
    first = os.environ.get("RANK", "0") == "0"
    if fork is not None:
        return _open_fork(config, fork, first=first)
    inputs = open_inputs(config, fresh=fresh)
    if fresh and first:
        # The others look into the folder only after they have met rank 0.
        aside = begin_again(config.run_dir)
        if aside is not None:
            _say(f"--fresh: {config.run_dir} is now {aside}")
    return config, inputs


def _open_fork(config: Config, name: str, *, first: bool) -> tuple[Config, Inputs]:
    inputs = open_inputs(config, fresh=True, starts=False)
    train = inputs.train
    vocab_size = model_vocab_size(config, train.vocab_size)
    data = Data(train.fingerprint, vocab_size, train.tokenizer_sha256)
    fork = plan_fork(config, name, data)
    if fork.begun or fork.keeps == "weights":
        inputs = open_inputs(fork.config)
    if first and not fork.begun:
        begin_fork(fork, data, _say)
    return fork.config, inputs


def agree_on(config: Config) -> None:
    """Return if all ranks have the same configuration.

    Each read the file by itself, and a file can be changed while a job starts. Raises ValueError
    on all ranks where one differs.
    """
    digest = hashlib.sha256(dump(config).encode()).hexdigest()
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    others = [rank for rank, found in enumerate(digests) if found != digests[0]]
    if others:
        raise ValueError(
            f"rank {others[0]} has another configuration than rank 0 ({len(others)} ranks have);"
            " a file was changed while the ranks read it, or nodes see different ones: start again"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
