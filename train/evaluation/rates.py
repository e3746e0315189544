"""Shares of right answers as tables: what a report shows of train.evaluation.questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Rate(Protocol):
    """A share with its 95 % interval; train.evaluation.confidence.Share is one."""

    @property
    def value(self) -> float:
        """The share, nan of no trials."""
        ...

    @property
    def low(self) -> float:
        """The interval's lower end."""
        ...

    @property
    def high(self) -> float:
        """The interval's upper end."""
        ...


class Place(Protocol):
    """Prompts of one length and depth, or one length and number of pairs."""

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        ...

    @property
    def depth(self) -> float | None:
        """Where the answer lies: 0 the begin of the document, 1 its end."""
        ...

    @property
    def pairs(self) -> int | None:
        """How many pairs the document holds."""
        ...

    @property
    def n(self) -> int:
        """Prompts."""
        ...

    @property
    def on(self) -> Rate:
        """Right with the memory on."""
        ...

    @property
    def off(self) -> Rate:
        """Right with the memory off."""
        ...

    @property
    def shuffled(self) -> Rate:
        """Right with another prompt's memory."""
        ...


class Table(NamedTuple):
    """Texts in rows; the first cell of each row heads it."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def cell_tables(cells: Sequence[Place]) -> list[Table]:
    """Return a task's tables: memory on as a grid, where it is one, then all shares in full."""
    second = "depth" if any(cell.depth is not None for cell in cells) else "pairs"
    values = sorted({value for cell in cells if (value := getattr(cell, second)) is not None})
    lengths = sorted({cell.length for cell in cells})
    found = {(cell.length, getattr(cell, second)): cell for cell in cells}
    tables = []
    if len(lengths) > 1 and len(values) > 1:
        rows = [
            [
                f"{length:,} tokens",
                *(f"{c.on.value:.2f}" if (c := found.get((length, v))) else "–" for v in values),
            ]
            for length in lengths
        ]
        heads = ["length", *(f"{second} {value:g}" for value in values)]
        tables.append(Table("share right, memory on", heads, rows))
    heads = ["length", *([second] if values else []), "prompts", "on", "off", "shuffled"]
    rows = [
        [
            f"{cell.length:,} tokens",
            *([f"{getattr(cell, second):g}"] if values else []),
            f"{cell.n:,}",
            *(rate_text(rate) for rate in (cell.on, cell.off, cell.shuffled)),
        ]
        for cell in cells
    ]
    return [*tables, Table("share right with its 95 % interval", heads, rows)]


def rate_text(rate: Rate) -> str:
    """Return a share with its interval: 0.97 [0.84, 0.99]."""
    if math.isnan(rate.value):
        return "–"
    return f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of texts in columns, each to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
