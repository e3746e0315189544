"""Token-level tasks: where the facts lie, what is asked, and what the answer is."""

from typing import Any

import numpy as np
import pytest

from data.tasks import (
    FILLER,
    IGNORE,
    KEY,
    KEY_DIGITS,
    PASSKEY_VOCAB,
    QUERY,
    TokenTask,
    associative_recall,
    fill,
    multi_fact_recall,
    passkeys,
    passkeys_at,
    single_fact,
    vocab_size,
)
from data.tasks.symbols import FIRST_NAME

B, N, S = 16, 5, 32


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def at_distance(distance: int, segments: int = N) -> TokenTask:
    return passkeys(rng(), batch=B, segments=segments, segment_len=16, distance=distance)


def facts_of(task: TokenTask, row: int, width: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return (segment, tokens after KEY) of each fact of a row, in the order of time."""
    found = np.argwhere(task.tokens[row] == KEY)
    return [(n, tuple(task.tokens[row, n, i + 1 : i + width].tolist())) for n, i in found.tolist()]


def answer_of(task: TokenTask, row: int) -> list[int]:
    labels: list[int] = task.labels[row][task.labels[row] != IGNORE].tolist()
    return labels


@pytest.mark.parametrize("distance", [0, 1, 4])
def test_the_key_lies_whole_in_the_segment_asked_for(distance: int) -> None:
    task = at_distance(distance)
    rows, segments, places = np.nonzero(task.tokens == KEY)
    assert rows.tolist() == list(range(B))
    assert set(segments) == {4 - distance} == set(task.gold)
    assert (places + KEY_DIGITS < 16).all()


@pytest.mark.parametrize("distance", [0, 3])
def test_the_labels_are_the_key_s_digits_after_the_query(distance: int) -> None:
    task = at_distance(distance)
    for row in range(B):
        [(_, digits)] = facts_of(task, row, 1 + KEY_DIGITS)
        assert answer_of(task, row) == list(digits)
        assert task.tokens[row, -1, -KEY_DIGITS - 1] == QUERY
        assert (task.labels[row, -1, -KEY_DIGITS - 1 : -1] == digits).all()


def test_all_else_is_filler() -> None:
    task = at_distance(2)
    assert (task.tokens < FILLER).sum() == task.tokens.size - B * 2 * (KEY_DIGITS + 1)
    assert task.plain.sum(0).tolist() == [B, B, 0, B, 0]


def test_a_distance_outside_the_document_is_refused() -> None:
    with pytest.raises(ValueError, match="distance=5"):
        at_distance(5)


@pytest.mark.parametrize(("position", "segment"), [("start", 0), ("middle", 2), ("end", 3)])
@pytest.mark.parametrize(("keys", "names"), [(1, 0), (1, 8), (3, 8)])
def test_the_asked_key_lies_where_it_should(
    position: Any, segment: int, keys: int, names: int
) -> None:
    task = passkeys_at(
        rng(), batch=B, segments=N, segment_len=S, position=position, keys=keys, names=names
    )
    named = int(names > 0)
    for row in range(B):
        facts = facts_of(task, row, 1 + named + KEY_DIGITS)
        assert len(facts) == keys
        question = task.tokens[row, -1, -KEY_DIGITS - named : -KEY_DIGITS].tolist()
        [asked] = [fact for fact in facts if list(fact[1][:named]) == question]
        assert asked[0] == segment == task.gold[row]
        assert answer_of(task, row) == list(asked[1][named:])
    assert task.tokens.max() < (vocab_size(names) if names else PASSKEY_VOCAB)


def test_keys_without_names_cannot_be_told_apart() -> None:
    with pytest.raises(ValueError, match="keys=2 without names"):
        passkeys_at(rng(), batch=1, segments=3, segment_len=S, position="start", keys=2)


def test_keys_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="8 facts|keys=8 do not fit"):
        passkeys_at(rng(), batch=1, segments=2, segment_len=32, position="start", keys=8, names=8)


def recall(**more: int) -> TokenTask:
    settings: dict[str, Any] = {"batch": B, "segments": N, "segment_len": S, "pairs": 8} | more
    return associative_recall(rng(), **settings)


@pytest.mark.parametrize("pairs", [1, 8, 40])
@pytest.mark.parametrize("overwrites", [0, 5])
def test_recall_asks_for_the_last_value_of_a_name(pairs: int, overwrites: int) -> None:
    task = recall(pairs=pairs, overwrites=overwrites, segment_len=S if pairs < 40 else 64)
    for row in range(B):
        facts = facts_of(task, row, 3)
        assert len(facts) == pairs + overwrites
        assert len({name for _, (name, _) in facts}) == pairs
        query, name = task.tokens[row, -1, -3:-1].tolist()
        about = [(segment, value) for segment, (known, value) in facts if known == name]
        assert query == QUERY and answer_of(task, row) == [about[-1][1]]
        assert task.gold[row] == about[-1][0] < task.tokens.shape[1] - 1
        assert not overwrites or len(about) > 1
        values = [value for _, value in about]
        assert all(old != new for old, new in zip(values, values[1:], strict=False))
    assert FIRST_NAME <= task.tokens.max() < vocab_size(64)


def test_facts_are_spread_over_all_segments_but_the_last() -> None:
    task = recall(pairs=20)
    counts = (task.tokens == KEY).sum((0, 2))
    assert counts[-1] == 0 and counts.sum() == B * 20
    assert counts[:-1].min() > B * 20 / 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"segments": 1}, "segments=1"),
        ({"pairs": 65}, "65 keys"),
        ({"pairs": 0}, "0 keys"),
        ({"pairs": 60}, "60 facts do not fit into 4 segments of 10"),
    ],
)
def test_recall_refuses_what_cannot_be(more: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recall(**more)


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


@pytest.mark.parametrize("segment", [0, 2, None])
def test_a_single_fact_is_memorized_or_detected(segment: int | None) -> None:
    task = single_fact(rng(), batch=B, segments=N, segment_len=S, segment=segment)
    for row in range(B):
        [(where, (value,))] = facts_of(task, row, 2)
        assert where == task.gold[row] and answer_of(task, row) == [value]
    assert set(task.gold) == ({segment} if segment is not None else {0, 1, 2, 3})
    assert task.tokens.max() < vocab_size(0)
    with pytest.raises(ValueError, match="segment=4 is not before"):
        single_fact(rng(), batch=1, segments=N, segment_len=S, segment=4)


def test_a_task_is_a_function_of_its_generator() -> None:
    for first, second in zip(recall(), recall(), strict=True):
        np.testing.assert_array_equal(first, second)
    assert fill(rng(), 2, 3, 4).shape == (2, 3, 4)
