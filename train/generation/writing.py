"""What generating reads and shows: a prompt's text into tokens, chosen tokens into text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from data.tokenizer import Tokenizer, load_tokenizer
from data.urls import shown_folder
from data.wide import WideCorpus
from model.decoder import Decoder
from model.sampling import Sampler, Sampling
from train.checkpoints.manifest import Manifest
from train.huggingface.tokenizer_files import TOKENIZER, imported_home, require_same_tokenizer
from train.reading.remote import open_remote
from train.settings.config import Config

PIECE_CHARACTERS = 1 << 20
"""Text read at once; at most this much of a prompt is held, whatever its length."""

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


def open_tokenizer(
    model: Decoder, config: Config, checkpoint: Path, manifest: Manifest, file: Path | None
) -> Tokenizer:
    """Return a checkpoint's tokenizer: of a file, else an imported model's, else the run's data's.

    Raises ValueError where it cannot be read, or is not the one that the model was trained with.
    """
    home = imported_home(checkpoint)
    if file is None and home is not None:
        file = home / TOKENIZER
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
        given = f"{shown_folder(folder)} was prepared with"
    else:
        words, given = load_tokenizer(str(file)), f"{file} is"
    ids = model.config.vocab_size if model.config.landmark is None else model.config.landmark
    if words.vocab_size > ids:
        raise ValueError(
            f"the tokenizer has {words.vocab_size} ids and the model reads {ids}: it was trained"
            " with another one; give that one with --tokenizer FILE"
        )
    remedy = "give the model's own with"
    require_same_tokenizer(checkpoint, manifest, words.sha256, given, remedy)
    return words


def never(model: Decoder, words: Tokenizer) -> list[int]:
    """Return the ids that are no text: landmarks, and what the tokenizer does not know."""
    return list(range(words.vocab_size, model.config.vocab_size))


def opened(prompt: str) -> TextIO:
    """Return the prompt's file, standard input for -; ValueError where it cannot be read."""
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


def room_of(segment_len: int, wanted: Wanted) -> int:
    """Return how many tokens of a prompt fit a segment beside what is written.

    For a model without memory. Raises ValueError where none does.
    """
    room = segment_len - wanted.max_tokens
    if room < 1:
        raise ValueError(
            f"max_tokens={wanted.max_tokens} leaves no room for a prompt in a segment of"
            f" {segment_len}, which is all that a model without memory sees; use at most"
            f" {segment_len - 1}"
        )
    return room


def check_fits(count: int, room: int, segment_len: int) -> None:
    """Raise ValueError for a prompt of more tokens than a model without memory has room for."""
    if count > room:
        raise ValueError(
            f"the prompt has {count:,} tokens, and a model without memory sees {segment_len}"
            f" with what it writes: it cannot stream; use --context truncate (its last {room}), or"
            " --context homer (all of it, merged, in one process), or a model with memory"
        )


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
        say(f"\nwrote {len(ids):,} tokens, {len(ids) / seconds:,.1f} tokens/s")


def show(texts: Iterable[str]) -> None:
    """Print a text as it comes, and end its line."""
    for text in texts:
        print(text, end="", flush=True)
    print()


def say(text: str) -> None:
    """Print a line beside the text."""
    print(text, file=sys.stderr)
