"""Whose state a stream reads with when memory is shuffled between documents."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.streams import Segment, Streams
from model.memory.base import State, map_tensors, named_tensors

NOBODY = -1
"""The document of padding, and of a stream that has read nothing."""


class Lanes:
    """Which document the state of each of some neighbouring lanes is of, segment by segment."""

    def __init__(self, streams: Streams, first: int, count: int) -> None:
        self.streams, self.first, self.count = streams, first, count
        self.held = np.full(count, NOBODY)
        self.turn = 0
        self.step = -1
        self.samples: list[list[Segment | None]] = []

    def donors(self, segment: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return for each lane whose state to read a segment with, and whether that shuffles.

        segment: its number in each lane, each one once and in order. A lane takes a state that
        has read at least one segment, all of them of another document; another lane's each time,
        where there are several. Where a document begins there is no past to shuffle: that counts.
        A lane without a donor keeps its own state.
        """
        now = self._read(segment)
        donors, shuffled = np.arange(self.count), np.zeros(self.count, dtype=bool)
        for lane, read in enumerate(now):
            if read is None or read.starts:
                shuffled[lane] = True
                continue
            for turn in range(self.count - 1):
                other = (lane + 1 + (self.turn + turn) % (self.count - 1)) % self.count
                if self.held[other] not in (NOBODY, read.document):
                    donors[lane], shuffled[lane] = other, True
                    break
        self.held = np.array([NOBODY if read is None else read.document for read in now])
        self.turn += 1
        return donors, shuffled

    def _read(self, segment: int) -> list[Segment | None]:
        """Return what each lane reads as this segment; None is padding."""
        step, place = divmod(segment, self.streams.segments)
        if step != self.step:
            position = step * self.streams.lanes + self.first
            self.samples = [self.streams.sample(position + lane) for lane in range(self.count)]
            self.step = step
        return [sample[place] for sample in self.samples]


def exchange(state: State, donors: NDArray[np.int64], *, keep_window: bool = False) -> State:
    """Return the state with each stream's tensors [B, ...] those of its donor, in new storage.

    keep_window: but for the window's, which stay the stream's own.
    """
    index = torch.from_numpy(donors)
    names = iter(named_tensors(state, "state"))

    def take(tensor: Tensor) -> Tensor:
        name = next(names)
        if keep_window and _of_window(name):
            return tensor
        return tensor.index_select(0, index.to(tensor.device))

    return map_tensors(take, state)


def has_window_and_more(state: State) -> bool:
    """Return whether a state holds a window's keys and something that reaches beyond them."""
    kinds = {
        _of_window(name)
        for name, tensor in named_tensors(state, "state").items()
        if tensor.is_floating_point() and tensor.numel()
    }
    return kinds == {True, False}


def bytes_per_stream(state: State) -> int:
    """Return the bytes of one stream's state on this rank; the tensors have B in front."""
    return sum(
        tensor.numel() * tensor.element_size() // max(1, tensor.shape[0])
        for tensor in named_tensors(state, "state").values()
    )


def _of_window(name: str) -> bool:
    return "window" in name.split("/")
