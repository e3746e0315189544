"""Losses by position in the document, and what they say about a memory.

The position of a prediction is the number of its document's tokens that the model had read
before the one it predicts from: 0 for a document's first token. A document that a lane enters
in the middle counts from there, because what lies before was never read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class PositionLosses:
    """Summed losses of one evaluation, over all ranks.

    Bucket i holds positions edges[i] to edges[i + 1] - 1. `passages` has, for each passage that
    goes on beyond its first segment, in the order read, the loss summed there and its tokens; a
    passage is a document, or the part of one that one lane reads.
    """

    memory: bool
    segment_len: int
    edges: tuple[int, ...]
    sums: tuple[float, ...]
    counts: tuple[int, ...]
    passages: tuple[tuple[float, int], ...]

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
        return math.exp(self.loss) if not self.loss > 700 else math.inf

    @property
    def means(self) -> tuple[float, ...]:
        """Mean loss of each bucket; nan for an empty one."""
        return tuple(_mean(*pair) for pair in zip(self.sums, self.counts, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return plain values; null where a number is not finite."""
        buckets = [
            {"first": first, "last": after - 1, "tokens": count, "loss": _finite(mean)}
            for first, after, count, mean in zip(
                self.edges, self.edges[1:], self.counts, self.means, strict=False
            )
        ]
        return {
            "memory": "on" if self.memory else "off",
            "segment_len": self.segment_len,
            "tokens": self.tokens,
            "loss": _finite(self.loss),
            "perplexity": _finite(self.perplexity),
            "positions": buckets,
        }


def bucket_edges(segment_len: int, longest: int) -> tuple[int, ...]:
    """Return 0, S/4, S/2, S, 2 S, ... up to the first that is at least `longest` tokens."""
    edges = [0, segment_len // 4, segment_len // 2, segment_len]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return tuple(sorted(set(edges)))


class Gain(NamedTuple):
    """What the memory saves beyond the first segment: nats a token, with its standard error."""

    mean: float
    error: float | None  # None: of fewer than two passages
    passages: int
    tokens: int


def gain(on: PositionLosses, off: PositionLosses) -> Gain | None:
    """Return loss(memory off) - loss(memory on) where a past exists to be remembered.

    The difference is taken token by token. Tokens of one passage are no independent samples, so
    the standard error is over passages (a ratio estimate, clustered by passage). None where no
    document goes on beyond its first segment.
    """
    assert on.counts == off.counts, "both runs must read the same tokens"
    tokens = [count for _, count in on.passages]
    saved = [forgot[0] - kept[0] for kept, forgot in zip(on.passages, off.passages, strict=True)]
    total, passages = sum(tokens), len(tokens)
    if not total:
        return None
    mean = sum(saved) / total
    if passages < 2:
        return Gain(mean, None, passages, total)
    squares = sum((d - mean * n) ** 2 for d, n in zip(saved, tokens, strict=True))
    error = math.sqrt(squares * passages / (passages - 1)) / total
    return Gain(mean, error, passages, total)


def describe_gain(on: PositionLosses, off: PositionLosses) -> str:
    """Return the gain in one line of words."""
    found = gain(on, off)
    if found is None:
        return "no document goes on beyond its first segment: nothing shows the memory's worth"
    error = f" +- {found.error:.4f}" if found.error is not None else ""
    noun = "passage" if found.passages == 1 else "passages"
    return (
        f"{found.mean:+.4f}{error} nats a token beyond the first segment"
        f" ({found.tokens:,} tokens of {found.passages:,} {noun})"
    )


def table(on: PositionLosses | None, off: PositionLosses | None) -> str:
    """Return an aligned table: one line a bucket, one column for each evaluation given."""
    first = on or off
    assert first is not None
    both = on is not None and off is not None
    columns = [losses for losses in (on, off) if losses is not None]
    heads = ["position", "tokens", *(f"memory {'on' if c.memory else 'off'}" for c in columns)]
    rows = [heads + ["off - on"] * both]
    for i, count in enumerate(first.counts):
        means = [column.means[i] for column in columns]
        rows.append([_range(first.edges, i), f"{count:,}", *_cells(means)])
    rows.append(["all", f"{first.tokens:,}", *_cells([column.loss for column in columns])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _cells(means: list[float]) -> list[str]:
    cells = [f"{mean:.4f}" if math.isfinite(mean) else "-" for mean in means]
    if len(means) == 2:
        difference = means[1] - means[0]
        cells.append(f"{difference:+.4f}" if math.isfinite(difference) else "-")
    return cells


def _range(edges: tuple[int, ...], i: int) -> str:
    return f"{edges[i]:,} - {edges[i + 1] - 1:,}"


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
