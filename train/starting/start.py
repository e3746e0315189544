"""Which run is started: a new one, one to go on with, one begun again, or a fork of another."""

from __future__ import annotations

import hashlib
import os
import sys

from train.agree import of_all
from train.reading.landmarks import model_vocab_size
from train.settings.config import Config, dump
from train.starting.fork import Data, begin_fork, plan_fork
from train.starting.fresh import begin_again
from train.starting.inputs import Inputs, open_inputs
from train.starting.lock import hold, release


def open_run(
    config: Config, *, fresh: bool = False, fork: str | None = None
) -> tuple[Config, Inputs]:
    """Return the run's configuration and its corpora; rank 0 prepares its folder.

    fresh: begin again, an old folder gets another name. fork: the name of a new run that begins
    from this one's newest checkpoint. Every rank calls this, before it meets the others. Raises
    ConfigError with every problem of data and checkpoint, and ValueError where
    another process trains the run.
    """
    first = os.environ.get("RANK", "0") == "0"
    if fork is not None:
        return _open_fork(config, fork, first=first)
    inputs = open_inputs(config, fresh=fresh)
    if first:
        # The others look into the folder only after they have met rank 0.
        hold(config.run_dir)
        if fresh:
            aside = begin_again(config.run_dir)
            if aside is not None:
                release(config.run_dir)
                hold(config.run_dir)
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
    if first:
        hold(fork.config.run_dir)
        if not fork.begun:
            begin_fork(fork, data, _say)
    return fork.config, inputs


def agree_on(config: Config, inputs: Inputs) -> None:
    """Return if all ranks have the same configuration, data and checkpoint to begin from.

    Each opened the files by itself, and a file can be changed while a job starts, or be another on
    another node. Raises ValueError on all ranks where one differs.
    """
    start, valid = inputs.start, inputs.valid
    ranks = of_all(
        {
            "configuration": hashlib.sha256(dump(config).encode()).hexdigest(),
            "data.train": inputs.train.fingerprint,
            "data.valid": "" if valid is None else valid.fingerprint,
            "model.init_from": "" if start is None else f"{start.path} {start.manifest.step}",
        }
    )
    for name, value in ranks[0].items():
        others = [rank for rank, found in enumerate(ranks) if found[name] != value]
        if others:
            raise ValueError(
                f"rank {others[0]} has another {name} than rank 0 ({len(others)} ranks have);"
                " a file was changed while the ranks read it, or nodes see different ones: start"
                " again"
            )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
