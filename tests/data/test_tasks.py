"""Token-level tasks: where the facts lie, what is asked, and what the answer is."""

from typing import Any

import numpy as np
import pytest

from data.tasks import (
    FILLER,
    IGNORE,
    KEY,
    QUERY,
    TokenTask,
    fill,
    multi_fact_recall,
    vocab_size,
)
from data.tasks.symbols import FIRST_NAME

B, N, S = 16, 5, 32


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def facts_of(task: TokenTask, row: int, width: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return (segment, tokens after KEY) of each fact of a row, in the order of time."""
    found = np.argwhere(task.tokens[row] == KEY)
    return [(n, tuple(task.tokens[row, n, i + 1 : i + width].tolist())) for n, i in found.tolist()]


def answer_of(task: TokenTask, row: int) -> list[int]:
    labels: list[int] = task.labels[row][task.labels[row] != IGNORE].tolist()
    return labels


def test_multi_fact_asks_twice_and_tells_the_gold_segment() -> None:
    task = multi_fact_recall(rng(), batch=B, segments=N, segment_len=S)
    for row in range(B):
        facts = facts_of(task, row, 3)
        assert [segment for segment, _ in facts] == [0, 1, 2, 3]
        assert len({name for _, (name, _) in facts}) == 4
        name, value = facts[task.gold[row]][1]
        assert task.tokens[row, -1, :2].tolist() == [QUERY, name]
        assert task.tokens[row, -1, -3:].tolist() == [QUERY, name, value]
        assert answer_of(task, row) == [value]
    assert len(set(task.gold)) == 4
    with pytest.raises(ValueError, match="use names=70"):
        multi_fact_recall(rng(), batch=1, segments=71, segment_len=S)


def test_all_else_is_filler_and_the_vocabulary_holds_the_names() -> None:
    task = multi_fact_recall(rng(), batch=B, segments=N, segment_len=S, names=8)
    written = (N - 1) * 3 + 2 + 3
    assert (task.tokens < FILLER).sum() == task.tokens.size - B * written
    assert FIRST_NAME <= task.tokens.max() < vocab_size(8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"segments": 1}, "segments=1"),
        ({"segment_len": 9}, "segment_len=9 is too short; use at least 10"),
        ({"segments": 66}, "65 keys need as many names"),
    ],
)
def test_what_cannot_be_is_refused(more: dict[str, int], message: str) -> None:
    settings: dict[str, Any] = {"batch": B, "segments": N, "segment_len": S} | more
    with pytest.raises(ValueError, match=message):
        multi_fact_recall(rng(), **settings)


def test_a_task_is_a_function_of_its_generator() -> None:
    tasks = [multi_fact_recall(rng(), batch=B, segments=N, segment_len=S) for _ in range(2)]
    for first, second in zip(*tasks, strict=True):
        np.testing.assert_array_equal(first, second)
    assert fill(rng(), 2, 3, 4).shape == (2, 3, 4)
