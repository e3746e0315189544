"""What the ranks' watchdogs tell each other, through the store that the ranks met in.

The store survives what hangs a rank: under torchrun it lives in the launcher of the first node, and
its messages are no collectives.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from train.watch.pulse import Place

_ANSWER_WITHIN = timedelta(seconds=10)
"""A store whose node is gone never answers."""


@dataclass(frozen=True)
class Report:
    """What one rank last said of itself."""

    rank: int
    node: str
    place: Place
    number: int  # of the report: one that grows no more is of a rank that is stopped or gone
    time: float  # seconds since 1970, on its node's clock
    still_s: float  # without progress
    limit_s: float  # that it may be without
    waits: str | None = None  # once still_s is above limit_s: what its thread is in
    collectives: tuple[str, ...] = ()  # and the last one that it began in each group

    @property
    def stuck(self) -> bool:
        """Whether it was without progress for longer than it may be."""
        return self.still_s > self.limit_s

    def to_text(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(asdict(self) | {"place": list(self.place)})

    @classmethod
    def from_text(cls, text: str) -> Report:
        """Return what to_text wrote."""
        values = json.loads(text)
        phase, step, micro_batch, segments, layer, direction = values.pop("place")
        part = None if segments is None else (segments[0], segments[1])
        place = Place(phase, step, micro_batch, part, layer, direction)
        return cls(place=place, **values | {"collectives": tuple(values["collectives"])})


class Peers:
    """The reports of all ranks; each call raises RuntimeError where the store does not answer."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        # A connection of its own: training's may be held by a call that waits for a rank.
        c10d: Any = dist.distributed_c10d
        self._store = c10d.PrefixStore("watch", c10d._get_default_store().clone())
        self._store.set_timeout(_ANSWER_WITHIN)

    def publish(self, report: Report) -> None:
        """Replace this rank's report."""
        self._store.set(f"rank-{self.rank}", report.to_text())

    def read(self) -> dict[int, Report]:
        """Return the reports there are, by rank."""
        found = {}
        for rank in range(self.world_size):
            key = f"rank-{rank}"
            if self._store.check([key]):
                found[rank] = Report.from_text(self._store.get(key).decode())
        return found

    def tell_reported(self) -> None:
        """Tell all that the hang was reported."""
        self._store.set("reported", "1")

    def reported(self) -> bool:
        """Return whether a rank has reported the hang."""
        return bool(self._store.check(["reported"]))
