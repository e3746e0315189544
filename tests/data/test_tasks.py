"""The passkey task: where the key lies and what is asked."""

import numpy as np
import pytest

from data.tasks import FILLER, IGNORE, KEY, KEY_DIGITS, QUERY, passkeys


def make(distance: int, segments: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    task = passkeys(rng, batch=16, segments=segments, segment_len=16, distance=distance)
    return task.tokens, task.labels


@pytest.mark.parametrize("distance", [0, 1, 4])
def test_the_key_lies_whole_in_the_segment_asked_for(distance: int) -> None:
    tokens, _ = make(distance)
    rows, segments, places = np.nonzero(tokens == KEY)
    assert rows.tolist() == list(range(16))
    assert set(segments) == {4 - distance}
    assert (places + KEY_DIGITS < 16).all()


@pytest.mark.parametrize("distance", [0, 3])
def test_the_labels_are_the_key_s_digits_after_the_query(distance: int) -> None:
    tokens, labels = make(distance)
    for row in range(16):
        segment, place = np.argwhere(tokens[row] == KEY)[0]
        digits = tokens[row, segment, place + 1 : place + 1 + KEY_DIGITS]
        asked = labels[row][labels[row] != IGNORE]
        np.testing.assert_array_equal(asked, digits)
        assert tokens[row, -1, -KEY_DIGITS - 1] == QUERY


def test_all_else_is_filler() -> None:
    tokens, _ = make(2)
    assert (tokens < FILLER).sum() == tokens.size - 16 * 2 * (KEY_DIGITS + 1)


def test_a_distance_outside_the_document_is_refused() -> None:
    with pytest.raises(ValueError, match="distance=5"):
        make(5)
