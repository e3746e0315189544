"""`longhaul generate`: read a prompt of any length, then write on.

The prompt is read in pieces through the model's memory (model.stream), so what is held does not
depend on its length; only landmark's `retrieve` keeps blocks of all of it, on the host. A model
without memory can see one segment; a longer prompt is cut (`truncate`), or merged hierarchically
(`homer`), which is always shown beside the cut one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from data.tokenizer import Tokenizer, load_tokenizer
from data.urls import shown_folder
from data.wide import WideCorpus
from model.compact import Compact, continue_from
from model.config import LandmarkMemory, NoMemory
from model.decoder import Decoder
from model.homer import merge_context, plan_merge, truncated
from model.memory.base import named_tensors
from model.sampling import Sampler, Sampling
from model.stream import Stream
from train.checkpoints.snapshot import read_model
from train.huggingface.tokenizer_files import TOKENIZER, imported_home
from train.remote import open_remote
from train.settings.config import Config

PIECE_CHARACTERS = 1 << 20
"""Text read at once; at most this much of a prompt is held, whatever its length."""

TOKENS_AT_ONCE = 8192
"""Tokens of a prompt in one forward pass, or one segment's where that is longer."""

Next = Callable[[int], Tensor]
"""Takes a token, returns the logits [V] after it."""


@dataclass(frozen=True)
class Wanted:
    """What to write, and until when."""

    max_tokens: int = 256
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens={self.max_tokens} is below 0; 0 only reads the prompt")
        if "" in self.stop:
            raise ValueError("stop: '' is in every text; give the text to stop at")


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
    homer, the end of the prompt that every chunk is read beside.

    Raises ValueError for everything that the user can mend.
    """
    model, config = read_model(checkpoint, changes)
    home = imported_home(checkpoint)
    if tokenizer is None and home is not None:
        tokenizer = home / TOKENIZER
    words = open_tokenizer(model, config, tokenizer)
    with _opened(prompt) as file:
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
    for text in write(
        logits, lambda token: _step(stream, token), words, wanted, never(model, words)
    ):
        print(text, end="", flush=True)
    print()
    return 0


def open_tokenizer(model: Decoder, config: Config, file: Path | None) -> Tokenizer:
    """Return the tokenizer of the run's data, or of a file, checked against the model."""
    if file is None:
        folder = config.data.valid or config.corpora[0].path
        try:
            # wide: its index is not needed
            words = WideCorpus.open(folder, remote=open_remote(config)).tokenizer()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the run's tokenizer lies in its data, {shown_folder(folder)}, which cannot be"
                f" read ({error}); give the same one with --tokenizer FILE"
            ) from None
    else:
        words = load_tokenizer(str(file))
    ids = model.config.vocab_size - isinstance(model.config.memory, LandmarkMemory)
    if words.vocab_size > ids:
        raise ValueError(
            f"the tokenizer has {words.vocab_size} ids and the model reads {ids}: it was trained"
            " with another one; give that one with --tokenizer FILE"
        )
    return words


def never(model: Decoder, words: Tokenizer) -> list[int]:
    """Return the ids that are no text: landmarks, and what the tokenizer does not know."""
    return list(range(words.vocab_size, model.config.vocab_size))


def _opened(prompt: str) -> TextIO:
    if prompt == "-":
        return sys.stdin
    try:
        return open(prompt, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"prompt {prompt!r} cannot be read: {error.strerror}; name a file, or -"
        ) from None


def encoded(file: TextIO, words: Tokenizer, name: str) -> Iterator[Tensor]:
    """Yield the tokens of a text, piece by piece: int64 [T]; at least one piece.

    Pieces end with a line or a word where the text has any; a tokenizer may still join across the
    end of one, once in PIECE_CHARACTERS. Raises ValueError for a prompt without a token.
    """
    rest, some = "", False
    while True:
        try:
            text = file.read(PIECE_CHARACTERS)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text: {error.reason}; convert it") from None
        whole, rest = _cut(rest + text) if text else (rest, "")
        if whole:
            ids = torch.from_numpy(words.encode(whole).astype("int64"))
            some |= ids.numel() > 0
            yield ids
        if not text:
            break
    if not some:
        raise ValueError(f"{name} is empty; a prompt needs at least one token")


def _cut(text: str) -> tuple[str, str]:
    """Return text up to behind its last line's end (else before its last word), and the rest."""
    line = text.rfind("\n") + 1
    if 0 < line < len(text):
        return text[:line], text[line:]
    word = text.rfind(" ")
    return (text[:word], text[word:]) if word > 0 else (text, "")


def read_prompt(model: Decoder, config: Config, pieces: Iterator[Tensor]) -> tuple[Stream, Tensor]:
    """Read a prompt to its end; return the stream there, and the logits [V] after it."""
    device = next(model.parameters()).device
    memory = model.config.memory
    landmark = model.config.vocab_size - 1 if isinstance(memory, LandmarkMemory) else None
    segment_len = config.data.segment_len
    at_once = max(1, TOKENS_AT_ONCE // segment_len)
    stream = Stream(model, segment_len, landmark=landmark, segments_per_call=at_once)
    logits = torch.zeros(0)
    began = time.perf_counter()
    with tqdm(desc="prompt", unit=" tokens", unit_scale=True, leave=False, disable=None) as bar:
        for part in _in_lengths(pieces, stream.text_len * at_once):
            logits = stream.read(part.unsqueeze(0).to(device))[0]
            bar.update(len(part))
    seconds = time.perf_counter() - began
    count = stream.num_tokens
    _say(f"read {count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s")
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


def write(
    logits: Tensor, step: Next, words: Tokenizer, wanted: Wanted, never: list[int]
) -> Iterator[str]:
    """Yield the text that follows, as it is complete; ends before a stop text or a document's end.

    A stop text is held back until it can no longer be one.
    """
    sampler = Sampler(wanted.sampling, never)
    ids: list[int] = []
    shown, longest = 0, max(map(len, wanted.stop), default=0)
    began = time.perf_counter()
    for _ in range(wanted.max_tokens):
        token = sampler.choose(logits)
        if token == words.end_of_document:
            break
        ids.append(token)
        text = words.decode(ids)
        ends = [at for stop in wanted.stop if (at := text.find(stop, max(0, shown - longest))) >= 0]
        if ends:
            yield text[shown : min(ends)]
            shown = len(text)
            break
        # A character may still be cut, and a stop text begun.
        ready = len(text) - max(longest - 1, 0)
        if ready > shown and not text.endswith("\ufffd"):
            yield text[shown:ready]
            shown = ready
        logits = step(token)
    text = words.decode(ids)
    if len(text) > shown:
        yield text[shown:]
    seconds = time.perf_counter() - began
    if ids:
        _say(f"\nwrote {len(ids):,} tokens, {len(ids) / seconds:,.1f} tokens/s")


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
    room = segment_len - wanted.max_tokens
    if room < 1:
        raise ValueError(
            f"max_tokens={wanted.max_tokens} leaves no room for a prompt in a segment of"
            f" {segment_len}, which is all that a model without memory sees; use at most"
            f" {segment_len - 1}"
        )
    if len(tokens) > room and context is None:
        raise ValueError(
            f"the prompt has {len(tokens):,} tokens, and a model without memory sees {segment_len}"
            f" with what it writes: it cannot stream; use --context truncate (its last {room}), or"
            " --context homer (all of it, merged), or a model with memory"
        )
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
    _say(f"read {len(tokens):,} tokens in {time.perf_counter() - began:.1f} s")
    for name, compact in read.items():
        if len(read) > 1:
            print(f"--- {name}: {compact.num_tokens:,} of {len(tokens):,} tokens kept")
        for text in write(compact.logits, _continue(compact), words, wanted, never(model, words)):
            print(text, end="", flush=True)
        print()


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
    _say(f"memory: {sum(x.numel() * x.element_size() for x in held):,} bytes")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
