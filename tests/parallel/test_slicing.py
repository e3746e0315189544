"""Layouts, by integers alone."""

import pytest
import torch
from torch import Tensor

from model.attention import Layout, Whole
from parallel.slicing import check_segment_len, choose_layout, take_slice

SIZES = pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
NAMES = pytest.mark.parametrize("name", ["zigzag", "contiguous"])


def reads(layout: Layout, size: int, segment_len: int) -> Tensor:
    """How often each key [column] of the segment is read by each query [row], over all ranks."""
    count = torch.zeros(segment_len, segment_len, dtype=torch.int64)
    length = segment_len // size
    places = [layout.positions(rank, segment_len) for rank in range(size)]
    for query_rank in range(size):
        for key_rank in range(size):
            for span in layout.spans(query_rank, key_rank, length):
                rows, columns = places[query_rank][span.queries], places[key_rank][span.keys]
                read = torch.ones(len(rows), len(columns), dtype=torch.int64)
                count[rows[:, None], columns] += read.tril() if span.causal else read
    return count


@SIZES
@NAMES
def test_positions_partition_the_segment(name: str, size: int) -> None:
    layout = choose_layout(name, size)
    places = torch.cat([layout.positions(rank, 48) for rank in range(size)])
    assert places.sort().values.tolist() == list(range(48))


@SIZES
@NAMES
def test_positions_of_a_rank_ascend(name: str, size: int) -> None:
    """Causality at home is by place in the slice."""
    for rank in range(size):
        assert choose_layout(name, size).positions(rank, 48).diff().min() > 0


@SIZES
@NAMES
def test_spans_together_are_exactly_the_causal_mask(name: str, size: int) -> None:
    count = reads(choose_layout(name, size), size, 48)
    assert torch.equal(count, torch.ones_like(count).tril())


def test_one_device_reads_exactly_the_causal_mask() -> None:
    count = reads(Whole(), 1, 12)
    assert torch.equal(count, torch.ones_like(count).tril())


@SIZES
@NAMES
def test_the_first_span_at_home_covers_all_queries(name: str, size: int) -> None:
    for rank in range(size):
        first = choose_layout(name, size).spans(rank, rank, 6)[0]
        assert range(6)[first.queries] == range(6)


def work(name: str, size: int, rank: int, step: int, length: int) -> int:
    """(query, key) pairs that rank computes at a step of the ring."""
    pairs = 0
    for span in choose_layout(name, size).spans(rank, (rank - step) % size, length):
        rows, columns = len(range(length)[span.queries]), len(range(length)[span.keys])
        pairs += rows * (rows + 1) // 2 if span.causal else rows * columns
    return pairs


@SIZES
def test_zigzag_gives_every_rank_the_same_work_at_every_step(size: int) -> None:
    for step in range(size):
        assert len({work("zigzag", size, rank, step, 6) for rank in range(size)}) == 1


def test_contiguous_gives_the_last_rank_the_most() -> None:
    totals = [sum(work("contiguous", 4, rank, t, 6) for t in range(4)) for rank in range(4)]
    assert totals == [21, 21 + 36, 21 + 72, 21 + 108]


def test_zigzag_of_two_ranks_is_outer_and_inner_quarters() -> None:
    layout = choose_layout("zigzag", 2)
    assert layout.positions(0, 8).tolist() == [0, 1, 6, 7]
    assert layout.positions(1, 8).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "size", "segment_len", "message"),
    [
        ("zigzag", 2, 10, r"segment_len=10 is not a multiple of 2 \* cp=4 .*; use 8"),
        ("zigzag", 4, 7, r"segment_len=7 is not a multiple of 2 \* cp=8 .*; use 8"),
        ("contiguous", 4, 30, r"segment_len=30 is not a multiple of cp=4; use 28"),
        ("contiguous", 1, 0, None),
        ("contiguous", 2, 10, None),
        ("zigzag", 2, 12, None),
    ],
)
def test_a_length_that_cannot_be_cut_is_refused(
    name: str, size: int, segment_len: int, message: str | None
) -> None:
    if message is None:
        check_segment_len(segment_len, size, name)
        assert len(choose_layout(name, size).positions(0, segment_len)) == segment_len // size
        return
    with pytest.raises(ValueError, match=message):
        check_segment_len(segment_len, size, name)
    with pytest.raises(ValueError, match=message):
        choose_layout(name, size).positions(0, segment_len)


@NAMES
def test_slices_hold_every_token_of_every_segment_once(name: str) -> None:
    layout, tokens = choose_layout(name, 4), torch.arange(2 * 3 * 16).view(2, 3, 16)
    slices = [take_slice(tokens, layout, rank) for rank in range(4)]
    assert {x.shape for x in slices} == {(2, 3, 4)}
    for segment in range(3):
        together = torch.cat([x[:, segment] for x in slices], 1)
        assert torch.equal(together.sort(1).values, tokens[:, segment])
