"""Losses by position in the document, with the memory on, off and shuffled.

The position of a prediction is the number of its document's tokens that the model had read
before the one it predicts from: 0 for a document's first token. A document that a lane enters
in the middle counts from there, because what lies before was never read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from train.evaluation.rates import aligned

Condition = Literal["on", "off", "shuffled", "beyond"]
"""How the past was handed on. on: by the memory. off: not at all, no window either. shuffled:
each segment was read with the state of a stream in another document. beyond: the same, but for
the window's keys, which stayed the stream's own."""

LABELS: dict[Condition, str] = {
    "on": "memory on",
    "off": "memory off",
    "shuffled": "shuffled",
    "beyond": "own window",
}
SHORT: dict[Condition, str] = {"on": "on", "off": "off", "shuffled": "shuffled", "beyond": "own w."}


class Part(NamedTuple):
    """What one passage has in one bucket beyond its first segment."""

    passage: int
    bucket: int
    loss: float  # summed, nats
    tokens: int


@dataclass(frozen=True)
class PositionLosses:
    """Summed losses of one evaluation under one condition, over all ranks.

    Bucket i holds positions edges[i] to edges[i + 1] - 1. `parts`: beyond the first segment, in
    the order read; a passage is a document, or the part of one that one lane reads.
    """

    condition: Condition
    segment_len: int
    edges: tuple[int, ...]
    sums: tuple[float, ...]
    counts: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return sum(self.counts)

    @property
    def loss(self) -> float:
        """Mean loss in nats a token; nan where nothing was read."""
        return _mean(sum(self.sums), self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(loss), inf where that is too large for a float."""
        return perplexity(self.loss)

    @property
    def means(self) -> tuple[float, ...]:
        """Mean loss of each bucket; nan for an empty one."""
        return tuple(_mean(*pair) for pair in zip(self.sums, self.counts, strict=True))

    @cached_property
    def passages(self) -> tuple[tuple[float, int], ...]:
        """Loss and tokens beyond the first segment of each passage that goes on there."""
        found: dict[int, tuple[float, int]] = {}
        for part in self.parts:
            loss, tokens = found.get(part.passage, (0.0, 0))
            found[part.passage] = (loss + part.loss, tokens + part.tokens)
        return tuple(found.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain values; null where a number is not finite."""
        buckets = [
            {
                "first": first,
                "last": after - 1,
                "tokens": count,
                "loss": finite(mean),
                "perplexity": finite(perplexity(mean)),
            }
            for first, after, count, mean in zip(
                self.edges, self.edges[1:], self.counts, self.means, strict=False
            )
        ]
        return {
            "memory": self.condition,
            "segment_len": self.segment_len,
            "tokens": self.tokens,
            "loss": finite(self.loss),
            "perplexity": finite(self.perplexity),
            "positions": buckets,
        }


@dataclass(frozen=True)
class Evaluation:
    """One reading of held-out documents, token by token the same under each condition.

    `paired` is memory on over the tokens of `shuffled` alone: where no stream of the group was
    in another document, there was nothing to shuffle with. `unshuffled` says why `shuffled` is
    missing. tokens_per_s: read with the memory on, all ranks; nan where not measured.
    state_bytes: the most that one stream carried on this rank.
    """

    on: PositionLosses | None = None
    off: PositionLosses | None = None
    shuffled: PositionLosses | None = None
    beyond: PositionLosses | None = None
    paired: PositionLosses | None = None
    unshuffled: str | None = None
    tokens_per_s: float = math.nan
    state_bytes: int = 0

    @property
    def columns(self) -> list[PositionLosses]:
        """The conditions that were measured, in order."""
        found = (self.on, self.off, self.shuffled, self.beyond)
        return [losses for losses in found if losses is not None]

    @property
    def pairs(self) -> list[tuple[PositionLosses, PositionLosses]]:
        """(memory on, another condition) over the same tokens, for each that can be compared."""
        candidates = (
            (self.on, self.off),
            (self.paired, self.shuffled),
            (self.paired, self.beyond),
        )
        return [(on, other) for on, other in candidates if on is not None and other is not None]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "evaluations": [losses.to_json() for losses in self.columns],
            "not_shuffled_because": self.unshuffled,
            "tokens_per_s": finite(self.tokens_per_s),
            "state_bytes": self.state_bytes,
        }


def bucket_edges(segment_len: int, longest: int) -> tuple[int, ...]:
    """Return 0, S/4, S/2, S, 2 S, ... up to the first that is at least `longest` tokens."""
    edges = [0, segment_len // 4, segment_len // 2, segment_len]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return tuple(sorted(set(edges)))


def bucket_name(edges: tuple[int, ...], i: int) -> str:
    """Return a bucket's positions in words: 64 - 127."""
    return f"{edges[i]:,} - {edges[i + 1] - 1:,}"


def table(evaluation: Evaluation) -> str:
    """Return an aligned table: a line a bucket, a column a condition, then the differences."""
    columns, pairs = evaluation.columns, evaluation.pairs
    heads = ["position", "tokens", *(LABELS[column.condition] for column in columns)]
    rows = [heads + [f"{SHORT[other.condition]} - on" for _, other in pairs]]
    for i, count in enumerate(columns[0].counts):
        cells = [_cell(column.means[i]) for column in columns]
        cells += [_cell(other.means[i] - on.means[i], "+") for on, other in pairs]
        rows.append([bucket_name(columns[0].edges, i), f"{count:,}", *cells])
    cells = [_cell(column.loss) for column in columns]
    cells += [_cell(other.loss - on.loss, "+") for on, other in pairs]
    rows.append(["all", f"{columns[0].tokens:,}", *cells])
    return aligned(rows)


def perplexity(loss: float) -> float:
    """Return exp(loss), inf where that is too large for a float."""
    return math.exp(loss) if not loss > 700 else math.inf


def finite(x: float) -> float | None:
    """Return x, None for nan and infinities: JSON has neither."""
    return x if math.isfinite(x) else None


def _cell(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if math.isfinite(value) else "-"


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan
