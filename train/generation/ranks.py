"""`longhaul generate` on several ranks: they share the keys of a prompt that no device holds.

Rank 0 reads the prompt, chooses every token and writes; the others do the same steps with the
tokens it tells them. An error before the first step is agreed on, so that all ranks end with it and
rank 0 says it, once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data.tokenizer import Tokenizer
from parallel.mesh import start_processes
from parallel.ring import choose_exchange
from train.agree import SomeRankFailed, of_first, together
from train.checkpoints.folder import choose_checkpoint, read_manifest
from train.checkpoints.snapshot import load_model, read_config
from train.generation.sharded import Sharded, check_sharded, continue_from, read_prompt
from train.generation.writing import (
    Next,
    Wanted,
    check_fits,
    encoded,
    never,
    open_tokenizer,
    opened,
    room_of,
    say,
    show,
    write,
)
from train.settings.config import Config
from train.settings.memories import to_memory_config

END = -1
"""Told to the ranks in place of a token."""


def run(
    checkpoint: Path,
    prompt: str,
    wanted: Wanted,
    *,
    context: str | None = None,
    tokenizer: Path | None = None,
    changes: Items[str] = (),
) -> int:
    """Do what generate.run does, on every rank that torchrun started; return 0.

    For models with `memory: none`. Raises ValueError, on rank 0 alone, for everything that the user
    can mend.
    """
    joined = not dist.is_initialized()
    start_processes()
    error: Exception | None = None
    try:
        _run(checkpoint, prompt, wanted, context, tokenizer, changes)
    except SomeRankFailed as failed:
        error = choose_error(failed)
    if joined:  # not after one rank's own error: NCCL would wait here for ranks that wait elsewhere
        dist.destroy_process_group()
    if error is not None:
        raise error
    return 0


def _run(
    checkpoint: Path,
    prompt: str,
    wanted: Wanted,
    context: str | None,
    tokenizer: Path | None,
    changes: Items[str],
) -> None:
    first, size = dist.get_rank() == 0, dist.get_world_size()
    path = of_first(lambda: _choose(checkpoint, context, changes, size))
    manifest = together(lambda: read_manifest(path))
    model, config = together(lambda: load_model(path, manifest, changes, _device()))
    words = together(
        lambda: open_tokenizer(model, config, path, manifest, tokenizer) if first else None
    )
    tokens = of_first(lambda: _read_tokens(prompt, words, config, wanted, context))
    assert dist.group.WORLD is not None
    exchange = choose_exchange("ring", dist.group.WORLD)
    began = time.perf_counter()
    sharded = read_prompt(model, tokens, exchange, config.data.segment_len)
    most = torch.tensor([sharded.nbytes], device=_device())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if words is None:
        follow(sharded)
        return
    say(f"read {len(tokens):,} tokens in {time.perf_counter() - began:.1f} s")
    say(f"keys: {int(most):,} bytes a rank, {size} ranks")
    with leading(sharded) as step:
        show(write(sharded.logits, step, words, wanted, never(model, words)))


def _choose(checkpoint: Path, context: str | None, changes: Items[str], size: int) -> Path:
    """Return the checkpoint, verified, if several ranks can share its keys; else ValueError."""
    path, manifest = choose_checkpoint(checkpoint)
    config = read_config(path, manifest, changes)
    check_sharded(to_memory_config(config.model.memory), size)
    if context == "homer":
        raise ValueError(
            f"--context homer merges the prompt on one device, and {size} ranks were started; use"
            " --context truncate, or one process without torchrun"
        )
    return path


def _read_tokens(
    prompt: str, words: Tokenizer | None, config: Config, wanted: Wanted, context: str | None
) -> Tensor:
    """Return the tokens to read, int64 [T]; ValueError where they are none or too many."""
    assert words is not None, "only rank 0 reads"
    segment_len = config.data.segment_len
    room = room_of(segment_len, wanted)
    with opened(prompt) as file:
        pieces = encoded(file, words, "standard input" if prompt == "-" else prompt)
        tokens = torch.cat(list(pieces))
    if context is None:
        check_fits(len(tokens), room, segment_len)
    return tokens[-room:].clone()


def _device() -> torch.device:
    """Return where this rank computes: a GPU of its own, or the CPU; see start_processes."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def choose_error(failed: SomeRankFailed) -> Exception | None:
    """Return what this rank ends with; None: another rank says it.

    Rank 0 has the message, its own or another rank's; what is no ValueError keeps its traceback on
    its own rank. A rank without an error exits with 0: torchrun ends all ranks at the first one
    that fails, which must be the one with the message.
    """
    if failed.own is not None and (dist.get_rank() == 0 or not isinstance(failed.own, ValueError)):
        return failed.own
    if dist.get_rank() == 0:
        rank, text = next(iter(failed.errors.items()))
        return ValueError(f"rank {rank}: {text}")
    return None


@contextlib.contextmanager
def leading(sharded: Sharded) -> Iterator[Next]:
    """Give rank 0 the step that every rank takes; with the block's end the others end, too."""
    in_step = False

    def step(token: int) -> Tensor:
        nonlocal in_step
        in_step = True
        _tell(token, sharded.logits.device)
        logits = continue_from(sharded, token)
        in_step = False
        return logits

    try:
        yield step
    finally:
        if not in_step:  # an error in a step is every rank's, or they wait elsewhere
            _tell(END, sharded.logits.device)


def follow(sharded: Sharded) -> None:
    """Take the steps that rank 0 takes, until it ends."""
    while (token := _tell(END, sharded.logits.device)) != END:
        continue_from(sharded, token)


def _tell(token: int, device: torch.device) -> int:
    """Return rank 0's token on every rank."""
    told = torch.tensor([token], device=device)
    dist.broadcast(told, 0)
    return int(told)
