"""Whose state a stream reads with when memory is shuffled."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.streams import Streams
from train.evaluation.donors import Lanes, bytes_per_stream, exchange, has_window_and_more


class Window(NamedTuple):
    k: Tensor


class Layer(NamedTuple):
    slots: Tensor
    window: Window


def state(batch: int = 3, window: int = 2) -> list[Layer]:
    rows = torch.arange(batch, dtype=torch.float32)
    return [
        Layer(rows.view(-1, 1) + 10 * n, Window(rows.view(-1, 1).expand(-1, window)))
        for n in (1, 2)
    ]


def read(lengths: list[int], lanes: int) -> list[tuple[list[int], list[bool], list[int]]]:
    """Return, by segment, donors, whether that shuffles, and the documents read."""
    streams = Streams(np.array(lengths), seed=0, lanes=lanes, segment_len=4, segments=2)
    who = Lanes(streams, 0, lanes)
    found = []
    for segment in range(2 * streams.steps_per_epoch):
        step, place = divmod(segment, 2)
        now = [streams.sample(step * lanes + lane)[place] for lane in range(lanes)]
        donors, shuffled = who.donors(segment)
        documents = [-1 if part is None else part.document for part in now]
        found.append((donors.tolist(), shuffled.tolist(), documents))
    return found


def test_a_donor_has_read_another_document() -> None:
    found = read([30, 50, 9, 70, 21, 33, 4, 40], lanes=4)
    exchanged = 0
    for (_, _, held), (donors, _, now) in zip(found, found[1:], strict=False):
        for lane, donor in enumerate(donors):
            if donor != lane:
                exchanged += 1
                assert held[donor] not in (-1, now[lane])
    assert exchanged > 20


def test_donors_take_turns() -> None:
    donors = [donors for donors, _, _ in read([64] * 4, lanes=4)[1:]]
    assert {by[0] for by in donors} == {1, 2, 3}


def test_where_a_document_begins_a_lane_keeps_its_own_and_that_counts() -> None:
    donors, shuffled, _ = read([16, 16], lanes=2)[0]
    assert (donors, shuffled) == ([0, 1], [True, True])


def test_without_another_document_a_lane_keeps_its_own_and_that_does_not_count() -> None:
    for donors, shuffled, _ in read([100], lanes=2)[1:12]:
        assert (donors, shuffled) == ([0, 1], [False, False])


def test_streams_are_exchanged_in_every_tensor() -> None:
    given = state()
    found = exchange(given, np.array([1, 2, 0]))
    assert [layer.slots.flatten().tolist() for layer in found] == [[11, 12, 10], [21, 22, 20]]
    assert found[0].window.k[:, 0].tolist() == [1, 2, 0]
    assert given[0].slots.flatten().tolist() == [10, 11, 12]


def test_a_window_can_stay() -> None:
    found = exchange(state(), np.array([1, 2, 0]), keep_window=True)
    assert found[1].slots.flatten().tolist() == [21, 22, 20]
    assert found[1].window.k[:, 0].tolist() == [0, 1, 2]


def test_a_window_is_told_by_its_name_and_by_holding_anything() -> None:
    assert has_window_and_more(state())
    assert not has_window_and_more(state(window=0))
    assert not has_window_and_more([Window(torch.zeros(2, 3))])


def test_bytes_are_those_of_one_stream() -> None:
    assert bytes_per_stream(state(batch=3)) == bytes_per_stream(state(batch=1)) == 2 * (4 + 8)
