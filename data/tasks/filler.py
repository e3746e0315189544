"""Text to hide facts in, and the hiding: a document of a wanted number of tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import NamedTuple

import numpy as np

from data.index import Corpus

Encode = Callable[[str], Sized]
"""Tokens of a text; only their number is used."""

_SENTENCE = re.compile(r"\s*\S.*?(?:[.!?]+[\"'”’)\]]*(?=\s)|\s*\Z)", re.DOTALL)
_WORD = re.compile(r"\s*\S+")
_LONGEST = 400  # characters of a piece: code and tables have no sentences


class Unfit(ValueError):
    """A length, or a segment, does not hold what must be in it; a longer one would."""


class Hidden(NamedTuple):
    """A document with facts in it."""

    document: str
    tokens: int
    starts: tuple[int, ...]  # the index in the document of each needed fact's first token


class Filler:
    """Pieces of text, sentences or whole passages, in their order; the last precedes the first."""

    def __init__(self, pieces: Iterable[str], encode: Encode, tokens: int | None = None) -> None:
        """Keep the pieces (None: all) that first hold `tokens` tokens.

        Each piece brings the white space that precedes it. A document longer than what is kept
        repeats: twice the longest length is plenty.
        """
        self.encode = encode
        self.pieces: list[str] = []
        self.counts: list[int] = []
        missing = math.inf if tokens is None else tokens
        for piece in pieces:
            if missing <= 0:
                break
            if piece.strip() and (count := len(encode(piece))):
                self.pieces.append(piece)
                self.counts.append(count)
                missing -= count
        if not self.pieces:
            raise ValueError("there is no filler text; give documents that are not empty")

    @classmethod
    def of(cls, documents: Iterable[str], encode: Encode, tokens: int | None = None) -> Filler:
        """Return the sentences of the documents that first hold `tokens` tokens (None: all)."""
        return cls((piece for document in documents for piece in _apart(document)), encode, tokens)

    def take(self, start: int, tokens: int) -> list[str]:
        """Return the pieces from `start` on that make at most `tokens` tokens."""
        found, at = [], start
        while self.counts[at] <= tokens:
            found.append(self.pieces[at])
            tokens -= self.counts[at]
            at = (at + 1) % len(self.pieces)
        return found

    def take_before(self, start: int, tokens: int) -> list[str]:
        """Return what precedes piece `start`, at most `tokens` tokens, first a piece's ending."""
        found, at = [], start - 1
        while self.counts[at] <= tokens:
            found.append(self.pieces[at])
            tokens -= self.counts[at]
            at = (at - 1) % len(self.pieces)
        ending = ""
        for word in reversed(_WORD.findall(self.pieces[at])):
            if len(self.encode(word + ending)) > tokens:
                break
            ending = word + ending
        return [ending, *reversed(found)]


def cut(text: str) -> Iterator[str]:
    """Return the sentences of a text, each with the white space before it, none after the last."""
    for match in _SENTENCE.finditer(text):
        piece = match.group()
        while len(piece) > _LONGEST:
            at = max(piece.rfind(mark, 1, _LONGEST) for mark in (" ", "\n"))
            at = at if at > 0 else _LONGEST
            yield piece[:at]
            piece = piece[at:]
        yield piece


def _apart(document: str) -> Iterator[str]:
    for number, piece in enumerate(cut(document)):
        yield piece if number or piece[0].isspace() else f"\n\n{piece}"


def corpus_texts(corpus: Corpus, tokens: int, *, seed: int = 0) -> Iterator[str]:
    """Return the documents of a prepared corpus as text, at most `tokens` tokens of each.

    Random order of (seed); damaged documents are left out.
    """
    tokenizer = corpus.tokenizer()
    for document in np.random.default_rng(seed).permutation(len(corpus.lengths)).tolist():
        if corpus.intact(document):
            stop = min(int(corpus.lengths[document]), tokens)
            yield tokenizer.decode(corpus.read_stored(document, 0, stop))


def hide(
    rng: np.random.Generator,
    filler: Filler,
    facts: Sequence[str],
    depths: Sequence[float],
    tokens: int,
    needed: Sequence[int],
) -> Hidden:
    """Return at most `tokens` tokens of filler, less by a word at most, with the facts in it.

    Each fact begins with white space and lies at the first border between pieces at or after
    its depth, 0 (before all) to 1 (after all) of the filler's characters; depths ascend. The
    filler begins at a random piece, or in the one before it to fill up. needed: the facts whose
    places are told. Raises Unfit where the facts alone are longer.
    """
    together = "".join(facts)
    size = len(filler.encode(together))
    if size > tokens:
        raise Unfit(
            f"{len(facts)} facts take {size} tokens and the document may have {tokens}; use a"
            f" greater length or fewer facts"
        )
    start = int(rng.integers(len(filler.pieces)))
    pieces = filler.take(start, tokens - size)
    # Tokens merge over the borders of pieces: their sum was only an upper estimate.
    missing = tokens - len(filler.encode(together + "".join(pieces)))
    pieces = filler.take_before(start, missing) + pieces
    while True:
        document, begins = _join(pieces, facts, depths)
        count = len(filler.encode(document))
        if count <= tokens or not pieces:
            starts = tuple(len(filler.encode(document[: begins[fact]])) for fact in needed)
            return Hidden(document, count, starts)
        words = _WORD.findall(pieces[0])
        pieces = ["".join(words[1:]), *pieces[1:]] if len(words) > 1 else pieces[1:]


def _join(
    pieces: Sequence[str], facts: Sequence[str], depths: Sequence[float]
) -> tuple[str, list[int]]:
    """Return the document, and the index in it of each fact's first character."""
    borders = np.cumsum([0, *(len(piece) for piece in pieces)])
    places = np.searchsorted(borders, np.asarray(depths) * borders[-1]).tolist()
    parts: list[str] = []
    begins: list[int] = []
    before = 0
    for fact, place in zip(facts, places, strict=True):
        parts += pieces[before:place]
        begins.append(int(borders[place]) + sum(len(text) for text in facts[: len(begins)]))
        parts.append(fact)
        before = place
    joined = "".join([*parts, *pieces[before:]])
    document = joined.lstrip()
    margin = len(joined) - len(document)
    return document, [max(0, begin - margin) for begin in begins]
