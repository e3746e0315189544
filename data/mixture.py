"""Several corpora read as one: what each one's share is, and documents by number over all.

An epoch of a mixture ends when the first corpus has been read once, the one that is smallest for
its weight. Of each other corpus an epoch takes the part that its weight asks for, and the next
epoch goes on where this one stopped: after E epochs every token of a corpus has been read E times
its share, rounded down or up.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from data.index import Corpus, Shards
from data.order import Order, Part
from data.packing import PackedSource
from data.passes import Everything, Int64Array, Source
from data.shards import TokenArray
from data.tokenizer import Tokenizer
from data.wide import ShardSource, WideCorpus


class Component(NamedTuple):
    """A corpus of a mixture, and the share of the tokens read that is to come from it."""

    name: str  # for people
    corpus: Corpus | WideCorpus
    weight: float  # of the sum of all


class Share(NamedTuple):
    """What an epoch reads of one corpus."""

    name: str
    tokens: int  # of the corpus
    segments: int  # of the corpus
    quota: int  # segments of it that an epoch reads

    @property
    def of_corpus(self) -> float:
        """The part of the corpus that an epoch reads."""
        return self.quota / self.segments

    def most_reads(self, epochs: int) -> int:
        """Return how often a token may have been read when so many epochs were begun."""
        return -(-epochs * self.quota // self.segments)

    def most_epochs(self, reads: int) -> int:
        """Return the epochs that may be begun before a token is read more than `reads` times."""
        return reads * self.segments // self.quota


class Mixture:
    """The documents of several corpora by number; their order in the list does not matter.

    Raises ValueError where they were made with different tokenizers, or two hold the same.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        assert components
        first, *others = components
        for other in others:
            _require_same_tokenizer(first, other)
        self.components = sorted(components, key=lambda part: part.corpus.fingerprint)
        for one, two in zip(self.components, self.components[1:], strict=False):
            if one.corpus.fingerprint == two.corpus.fingerprint:
                raise ValueError(
                    f"{one.name} and {two.name} hold the same documents; name one of them, with"
                    " the weight of both"
                )
        self._corpora = [part.corpus for part in self.components]
        self._first = [0, *accumulate(corpus.documents for corpus in self._corpora)]
        self.documents = self._first[-1]
        self.vocab_size = first.corpus.vocab_size
        self.tokenizer_sha256 = first.corpus.tokenizer_sha256
        self.end_of_document = first.corpus.end_of_document
        self.fingerprint = self._corpora[0].fingerprint
        if others:
            shares = zip(self._corpora, self.weights(), strict=True)
            parts = [[corpus.fingerprint, str(weight)] for corpus, weight in shares]
            self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def weights(self) -> list[Fraction]:
        """Return the weights as written in decimals, exactly, and made to add up to 1."""
        exact = [Fraction(str(part.weight)) for part in self.components]
        return [weight / sum(exact) for weight in exact]

    @property
    def damage(self) -> tuple[str, ...]:
        """What was skipped so far, each entry naming its file (on_damage="skip")."""
        return tuple(text for corpus in self._corpora for text in corpus.damage)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of all; ValueError if what lies beside the shards is another."""
        return self._corpora[0].tokenizer()

    def describe(self) -> str:
        """Return the manifests and weights, as JSON."""
        parts = [
            {
                "path": part.name,
                "weight": part.weight,
                "fingerprint": part.corpus.fingerprint,
                "manifest": json.loads(part.corpus.describe()),
            }
            for part in self.components
        ]
        return json.dumps({"mixture": parts}, indent=1) + "\n"

    def length(self, document: int) -> int:
        """Return the tokens of a document."""
        corpus, number = self._find(document)
        return corpus.length(number)

    def intact(self, document: int) -> bool:
        """Say whether a document can be read; ValueError where a damaged one is to stop."""
        corpus, number = self._find(document)
        return corpus.intact(number)

    def read_stored(self, document: int, start: int, stop: int) -> TokenArray:
        """Return tokens [start, stop) of a document as stored: read-only uint16 or uint32."""
        corpus, number = self._find(document)
        return corpus.read_stored(number, start, stop)

    def _find(self, document: int) -> tuple[Shards, int]:
        part = bisect_right(self._first, document) - 1
        return self._corpora[part], document - self._first[part]


def _require_same_tokenizer(one: Component, two: Component) -> None:
    ours, theirs = one.corpus.manifest, two.corpus.manifest
    if ours.tokenizer_sha256 != theirs.tokenizer_sha256:
        raise ValueError(
            f"{two.name} was made with tokenizer {theirs.tokenizer} (sha256"
            f" {theirs.tokenizer_sha256[:12]}, {theirs.vocab_size} ids), {one.name} with"
            f" {ours.tokenizer} (sha256 {ours.tokenizer_sha256[:12]}, {ours.vocab_size} ids); the"
            " corpora of a mixture share one: prepare both with the same"
        )


def choose_quotas(
    weights: Sequence[Fraction], tokens: Sequence[int], segments: Sequence[int]
) -> list[int]:
    """Return the segments that an epoch takes of each corpus, at least 1.

    The smallest corpus for its weight is taken whole; tokens of the others are in the ratio of the
    weights, to half a segment. tokens, segments: of each corpus.
    """
    epoch = min(Fraction(held) / weight for held, weight in zip(tokens, weights, strict=True))
    return [
        max(1, round(epoch * weight * count / held))
        for weight, held, count in zip(weights, tokens, segments, strict=True)
    ]


def plan(
    documents: Corpus | WideCorpus | Mixture,
    counts: Sequence[Int64Array] | None,
    *,
    seed: int,
    segment_len: int,
    shuffle_shards: int | None,
    packing: bool = False,
) -> tuple[Order, list[Share]]:
    """Return the order of a run's documents and what an epoch reads of each corpus.

    counts: segments of each shard, for each corpus of the mixture (in its own order); needed with
    shuffle_shards, for corpora whose index is not in memory. packing: of PackedStreams; for
    corpora whose index is.
    """
    if isinstance(documents, Mixture):
        components, weights = documents.components, documents.weights()
    else:
        components, weights = [Component(str(documents.folder), documents, 1.0)], [Fraction(1)]
    sources: list[Source] = []
    for number, part in enumerate(components):
        if isinstance(part.corpus, WideCorpus):
            assert counts is not None and not packing
            sources.append(ShardSource(part.corpus, counts[number]))
        else:
            source = PackedSource if packing else Everything
            sources.append(source(part.corpus.lengths, segment_len))
    tokens = [part.corpus.tokens for part in components]
    segments = [int(source.segments.sum()) for source in sources]
    quotas = choose_quotas(weights, tokens, segments)
    windows = None
    if shuffle_shards is not None:
        shards = sum(len(source.segments) for source in sources)
        # A window is as much as N shards of average size, and at least a segment.
        windows = min(-(-sum(quotas) * shards // (sum(segments) * shuffle_shards)), sum(quotas))
    order = Order(
        [Part(source, quota) for source, quota in zip(sources, quotas, strict=True)],
        seed=seed,
        segment_len=segment_len,
        windows=windows,
    )
    shares = [
        Share(part.name, *numbers)
        for part, *numbers in zip(components, tokens, segments, quotas, strict=True)
    ]
    return order, shares
