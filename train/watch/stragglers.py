"""Which rank, or node, makes the others wait: seconds of own work in a step, compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from train.watch.waiting import Waiting

SLOW = 1.25
"""Times the median rank's own work: less is the usual spread of ranks that share a host."""
_NODES_SHOWN = 3


class Spread(NamedTuple):
    """Own seconds a step, over ranks."""

    slowest: int  # a rank
    slowest_s: float
    median_s: float
    nodes: list[tuple[str, float]]  # name and its ranks' median, the slowest first

    @property
    def ratio(self) -> float:
        """The slowest rank's own seconds in those of the median rank."""
        return self.slowest_s / max(self.median_s, 1e-9)

    def describe(self, nodes: Sequence[str]) -> str:
        """Return it as a sentence; nodes: the ranks' ones."""
        shown = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in self.nodes[:_NODES_SHOWN])
        more = len(self.nodes) - _NODES_SHOWN
        by_node = f"; by node: {shown}{f' and {more} more' if more > 0 else ''}"
        return (
            f"straggler: rank {self.slowest} on {nodes[self.slowest]} works {self.slowest_s:.3g} s"
            f" a step, the median rank {self.median_s:.3g} s ({self.ratio:.2f} times)"
            + by_node
            * (len(self.nodes) > 1)
        )


def compare(own_s: Sequence[float], nodes: Sequence[str]) -> Spread:
    """Return the spread of the ranks' own seconds, on their nodes."""
    by_node: dict[str, list[float]] = defaultdict(list)
    for node, seconds in zip(nodes, own_s, strict=True):
        by_node[node].append(seconds)
    slowest = max(range(len(own_s)), key=lambda rank: own_s[rank])
    medians = [(node, median(values)) for node, values in by_node.items()]
    medians.sort(key=lambda pair: -pair[1])
    return Spread(slowest, own_s[slowest], median(own_s), medians)


class Stragglers:
    """Sums this rank's own seconds, and compares them when asked to."""

    def __init__(self, nodes: Sequence[str], waiting: Waiting, device: torch.device) -> None:
        self.nodes, self._waiting, self._device = nodes, waiting, device
        self._waited = waiting.seconds
        self._own_s, self._steps = 0.0, 0
        self._suspect: int | None = None
        self._named: int | None = None

    def begin(self) -> None:
        """Begin a step: what was waited for before it, in an evaluation or a save, is not its."""
        self._waited = self._waiting.seconds

    def add(self, step_s: float) -> None:
        """Take in a step of so many seconds, data and collectives included."""
        waited = self._waiting.seconds
        self._own_s += step_s - (waited - self._waited)
        self._waited, self._steps = waited, self._steps + 1

    def compare(self) -> Spread:
        """Return the spread of the mean own seconds since the last call; all ranks together."""
        mine = torch.tensor(self._own_s / max(1, self._steps), device=self._device)
        everyone = torch.empty(len(self.nodes), device=self._device)
        dist.all_gather_into_tensor(everyone, mine.view(1))
        self._own_s, self._steps = 0.0, 0
        return compare(everyone.tolist(), self.nodes)

    def news(self, spread: Spread) -> str | None:
        """Return a sentence, once, where the same rank is slow for the second time in a row.

        Once may be chance: a first step that compiles, a neighbour on the host.
        """
        slow = spread.slowest if spread.ratio > SLOW else None
        again, self._suspect = slow == self._suspect, slow
        if slow is None:
            self._named = None
        if slow is None or not again or slow == self._named:
            return None
        self._named = slow
        return spread.describe(self.nodes)
