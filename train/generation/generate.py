"""`longhaul generate`: read a prompt of any length, then write on.

The prompt is read in pieces through the model's memory (model.stream), so what is held does not
depend on its length; only landmark's `retrieve` keeps blocks of all of it, on the host. A model
without memory can see one segment; a longer prompt is cut (`truncate`), or merged hierarchically
(`homer`), which is always shown beside the cut one. Several ranks share the keys of such a segment
(train.generation.ranks).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.tokenizer import Tokenizer
from model.compact import Compact, continue_from
from model.config import NoMemory
from model.decoder import Decoder
from model.homer import merge_context, plan_merge, truncated
from model.memory.base import named_tensors
from model.stream import Stream
from train.checkpoints.folder import choose_checkpoint
from train.checkpoints.snapshot import load_model
from train.generation import ranks
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

TOKENS_AT_ONCE = 8192
"""Tokens of a prompt in one forward pass, or one segment's where that is longer."""


def run(
    checkpoint: Path,
    prompt: str,
    wanted: Wanted,
    *,
    context: str | None = None,
    tokenizer: Path | None = None,
    suffix_tokens: int = 64,
    changes: Items[str] = (),
) -> int:
    """Read the prompt (a file, or - for standard input), print it continued, and return 0.

    context: for models without memory, `truncate` or `homer`. tokenizer: a file; None takes the
    imported model's, else the run's own. changes: see snapshot.read_model. suffix_tokens: with
    homer, the end of the prompt that every chunk is read beside. Under torchrun with several
    processes all of them call this; see train.generation.ranks.

    Raises ValueError for everything that the user can mend.
    """
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return ranks.run(
            checkpoint, prompt, wanted, context=context, tokenizer=tokenizer, changes=changes
        )
    path, manifest = choose_checkpoint(checkpoint)
    model, config = load_model(path, manifest, changes)
    words = open_tokenizer(model, config, path, manifest, tokenizer)
    with opened(prompt) as file:
        pieces = encoded(file, words, "standard input" if prompt == "-" else prompt)
        if isinstance(model.config.memory, NoMemory):
            _without_memory(model, config, words, pieces, wanted, context, suffix_tokens)
            return 0
        if context is not None:
            raise ValueError(
                f"--context {context} is for models without memory, and {checkpoint} has"
                f" {model.config.memory.name}: it reads a prompt of any length; leave it out"
            )
        stream, logits = read_prompt(model, config, pieces)
    _say_state(stream)
    show(write(logits, lambda token: _step(stream, token), words, wanted, never(model, words)))
    return 0


def read_prompt(model: Decoder, config: Config, pieces: Iterator[Tensor]) -> tuple[Stream, Tensor]:
    """Read a prompt to its end; return the stream there, and the logits [V] after it."""
    device = next(model.parameters()).device
    segment_len = config.data.segment_len
    at_once = max(1, TOKENS_AT_ONCE // segment_len)
    stream = Stream(model, segment_len, segments_per_call=at_once)
    logits = torch.zeros(0)
    began = time.perf_counter()
    with tqdm(desc="prompt", unit=" tokens", unit_scale=True, leave=False, disable=None) as bar:
        for part in _in_lengths(pieces, stream.text_len * at_once):
            logits = stream.read(part.unsqueeze(0).to(device))[0]
            bar.update(len(part))
    seconds = time.perf_counter() - began
    count = stream.num_tokens
    say(f"read {count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s")
    return stream, logits


def _in_lengths(pieces: Iterator[Tensor], length: int) -> Iterator[Tensor]:
    """Yield the tokens of all pieces, `length` at a time; the last part may be shorter."""
    held = torch.zeros(0, dtype=torch.int64)
    for piece in pieces:
        held = torch.cat((held, piece))
        while len(held) >= length:
            yield held[:length]
            held = held[length:]
    if len(held):
        yield held


def _step(stream: Stream, token: int) -> Tensor:
    device = next(stream.model.parameters()).device
    return stream.read(torch.tensor([[token]], device=device))[0]


def _without_memory(
    model: Decoder,
    config: Config,
    words: Tokenizer,
    pieces: Iterator[Tensor],
    wanted: Wanted,
    context: str | None,
    suffix_tokens: int,
) -> None:
    """Continue a prompt with a model that sees one segment."""
    tokens, segment_len = torch.cat(list(pieces)), config.data.segment_len
    room = room_of(segment_len, wanted)
    if context is None:
        check_fits(len(tokens), room, segment_len)
    nothing = tokens[:0]
    began = time.perf_counter()
    read = {
        "truncate": truncated(
            model, nothing, tokens, nothing, chunk_len=room, segment_len=segment_len
        )
    }
    if context == "homer" and len(tokens) > room:
        suffix = min(suffix_tokens, room // 2)
        read["homer"] = merge_context(
            model,
            nothing,
            tokens[:-suffix],
            tokens[-suffix:],
            chunk_len=room,
            target_len=room,
            warmup_layers=_warmup_layers(model, len(tokens) - suffix, suffix, room),
            segment_len=segment_len,
        )
    say(f"read {len(tokens):,} tokens in {time.perf_counter() - began:.1f} s")
    for name, compact in read.items():
        if len(read) > 1:
            print(f"--- {name}: {compact.num_tokens:,} of {len(tokens):,} tokens kept")
        show(write(compact.logits, _continue(compact), words, wanted, never(model, words)))


def _warmup_layers(model: Decoder, context_len: int, suffix_len: int, chunk_len: int) -> int:
    """Return the layers below all pruning: 12 of 32 as in the paper, fewer if levels need them.

    Raises ValueError where the context is too long for the model's layers.
    """
    for layers in range(3 * model.config.num_layers // 8, -1, -1):
        try:
            plan_merge(
                context_len,
                suffix_len,
                chunk_len=chunk_len,
                target_len=chunk_len,
                num_layers=model.config.num_layers,
                warmup_layers=layers,
            )
        except ValueError:
            if layers == 0:
                raise
            continue
        break
    return layers


def _continue(compact: Compact) -> Next:
    return lambda token: continue_from(compact, token)


def _say_state(stream: Stream) -> None:
    held = named_tensors(stream.carried, "state").values()
    say(f"memory: {sum(x.numel() * x.element_size() for x in held):,} bytes")
