"""Landmarks in batches: where they stand, and what is predicted around them."""

import subprocess
import sys

import pytest
import torch

from data.landmarks import insert_landmarks, regular_len
from data.streams import IGNORE, Batch

LANDMARK = 99


def batch(rows: int, segments: int, regular: int) -> Batch:
    """Each row one document: token t of row b is 10 * b + t, and the last has no label."""
    tokens = torch.arange(segments * regular).repeat(rows, 1) + 10 * torch.arange(rows).unsqueeze(1)
    labels = torch.cat((tokens[:, 1:], torch.full((rows, 1), IGNORE)), 1)
    shape = (rows, segments, regular)
    starts = torch.zeros(rows, segments, dtype=torch.bool)
    starts[:, 0] = True
    offsets = torch.arange(segments).mul(regular).repeat(rows, 1)
    return Batch(tokens.view(shape), labels.view(shape), starts, offsets, 5)


def test_a_landmark_closes_every_block() -> None:
    marked = insert_landmarks(batch(1, 2, 4), 3, LANDMARK)
    assert marked.tokens.tolist() == [[[0, 1, LANDMARK, 2, 3, LANDMARK], [4, 5, 99, 6, 7, 99]]]


def test_labels_step_over_landmarks() -> None:
    """Also over a landmark that ends its segment; none is a label, and none has one."""
    marked = insert_landmarks(batch(1, 2, 4), 3, LANDMARK)
    assert marked.labels.tolist() == [
        [[1, 2, IGNORE, 3, 4, IGNORE], [5, 6, IGNORE, 7, IGNORE, IGNORE]]
    ]


@pytest.mark.parametrize(("block", "regular"), [(2, 3), (4, 12), (64, 63)])
def test_without_its_landmarks_a_batch_is_what_it_was(block: int, regular: int) -> None:
    before = batch(3, 2, regular)
    marked = insert_landmarks(before, block, 10**6)
    length = regular // (block - 1) * block
    assert marked.tokens.shape == marked.labels.shape == (3, 2, length)
    assert regular_len(length, block) == regular
    text = torch.arange(length) % block != block - 1
    assert torch.equal(marked.tokens[..., text], before.tokens)
    assert torch.equal(marked.labels[..., text], before.labels)
    assert (marked.tokens[..., ~text] == 10**6).all()
    assert (marked.labels[..., ~text] == IGNORE).all()
    assert torch.equal(marked.starts, before.starts)
    assert torch.equal(marked.offsets, before.offsets)
    assert marked.first_position == before.first_position


def test_the_batch_given_is_not_changed() -> None:
    given, twin = batch(2, 1, 6), batch(2, 1, 6)
    insert_landmarks(given, 4, LANDMARK)
    assert torch.equal(given.tokens, twin.tokens)
    assert torch.equal(given.labels, twin.labels)


@pytest.mark.parametrize(("segment_len", "near"), [(70, 64), (5, 16), (0, 16)])
def test_segments_are_whole_blocks(segment_len: int, near: int) -> None:
    with pytest.raises(ValueError, match=f"segment_len={segment_len} is not.*use {near}$"):
        regular_len(segment_len, 16)


def test_regular_tokens_fill_blocks() -> None:
    with pytest.raises(ValueError, match="8 regular tokens are not a multiple of 3.*segments of 6"):
        insert_landmarks(batch(1, 1, 8), 4, LANDMARK)


def test_a_block_has_room_for_text() -> None:
    for call in (lambda: regular_len(4, 1), lambda: insert_landmarks(batch(1, 1, 4), 1, LANDMARK)):
        with pytest.raises(ValueError, match="block=1 has no room.*at least 2"):
            call()


def test_the_landmarks_id_is_its_own() -> None:
    with pytest.raises(ValueError, match="landmark=3 is the id of a token"):
        insert_landmarks(batch(1, 1, 4), 3, 3)


def test_importing_it_starts_no_torch() -> None:
    """`longhaul prepare` and its workers import data without torch."""
    code = "import sys, data.landmarks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
