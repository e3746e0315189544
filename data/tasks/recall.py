"""Associative recall: what stood beside this name, when it was last written?"""

from __future__ import annotations

import numpy as np

from data.tasks.symbols import (
    FIRST_VALUE,
    KEY,
    QUERY,
    VALUES,
    Int64Array,
    TokenTask,
    ask,
    choose_slots,
    fill,
    name_rows,
    require_room,
    slots_of,
    write,
)


def associative_recall(
    rng: np.random.Generator,
    *,
    batch: int,
    segments: int,
    segment_len: int,
    pairs: int,
    overwrites: int = 0,
    names: int = 64,
) -> TokenTask:
    """Return documents of `pairs` facts KEY name value, and QUERY name value about one of them.

    The facts lie anywhere before the last segment. overwrites: as many facts more give a name
    that has a value another one, and the question is about such a name: the last value counts.
    `symbols.vocab_size(names)` is the vocabulary; 32 values, so chance is 1 / 32.
    """
    require_room(segment_len, 3, segments)
    rows, writes = np.arange(batch), pairs + overwrites
    named = name_rows(rng, batch, names, pairs)
    # Which name each fact is about, in the order of time: all once, and some more than once.
    again = rng.integers(0, pairs, (batch, overwrites))
    about = np.concatenate([np.tile(np.arange(pairs), (batch, 1)), again], 1)
    about = rng.permuted(about, axis=1)
    values, last = _values(rng, about, pairs)
    asked = again[:, 0] if overwrites else rng.integers(0, pairs, batch)
    slots = slots_of(segment_len, 3)
    places = choose_slots(rng, batch, segments - 1, slots, writes)
    facts = np.stack([np.full_like(about, KEY), named[rows[:, None], about], values], 2)
    tokens = fill(rng, batch, segments, segment_len)
    write(rng, tokens, places, facts)
    final = last[rows, asked]
    question = np.stack([np.full(batch, QUERY), named[rows, asked]], 1)
    return ask(tokens, question, values[rows, final][:, None], places[rows, final] // slots)


def multi_fact_recall(
    rng: np.random.Generator, *, batch: int, segments: int, segment_len: int, names: int = 64
) -> TokenTask:
    """Return documents with one fact KEY name value in each segment but the last.

    The last segment begins with QUERY name, so that what is read of its first half can search
    for it, and ends with QUERY name value. (HMT's selective recall; gold is what a search must
    find.) Names differ within a document, so `names` must be at least segments - 1.
    """
    require_room(segment_len, 10, segments)
    rows, facts = np.arange(batch), segments - 1
    named = name_rows(rng, batch, names, facts)
    values = rng.integers(FIRST_VALUE, FIRST_VALUE + VALUES, (batch, facts))
    slots = slots_of(segment_len, 3)
    places = np.arange(facts) * slots + rng.integers(0, slots, (batch, facts))
    tokens = fill(rng, batch, segments, segment_len)
    write(rng, tokens, places, np.stack([np.full_like(named, KEY), named, values], 2))
    gold = rng.integers(0, facts, batch)
    question = np.stack([np.full(batch, QUERY), named[rows, gold]], 1)
    tokens[:, -1, :2] = question
    return ask(tokens, question, values[rows, gold][:, None], gold)


def single_fact(
    rng: np.random.Generator,
    *,
    batch: int,
    segments: int,
    segment_len: int,
    segment: int | None = 0,
) -> TokenTask:
    """Return documents with one fact KEY value, asked for by QUERY value.

    segment 0: "memorize"; None: a random one before the last, "detect and memorize" (RMT, 1M
    paper). Vocabulary 64.
    """
    require_room(segment_len, 4, segments)
    if segment is not None and not 0 <= segment < segments - 1:
        raise ValueError(f"segment={segment} is not before the question's, {segments - 1}")
    slots = slots_of(segment_len, 2)
    gold = rng.integers(0, segments - 1, batch) if segment is None else np.full(batch, segment)
    value = rng.integers(FIRST_VALUE, FIRST_VALUE + VALUES, (batch, 1))
    tokens = fill(rng, batch, segments, segment_len)
    places = gold[:, None] * slots + rng.integers(0, slots, (batch, 1))
    write(rng, tokens, places, np.stack([np.full_like(value, KEY), value], 2))
    return ask(tokens, np.full((batch, 1), QUERY), value, gold)


def _values(
    rng: np.random.Generator, about: Int64Array, pairs: int
) -> tuple[Int64Array, Int64Array]:
    """Return each fact's value [B, W], and the last fact [B, pairs] about each name.

    A value that replaces another differs from it: to remember the first is to be wrong.
    """
    batch, writes = about.shape
    rows = np.arange(batch)
    current = rng.integers(0, VALUES, (batch, pairs))
    steps = rng.integers(1, VALUES, (batch, writes))
    values, last = np.empty_like(about), np.zeros((batch, pairs), dtype=np.int64)
    for fact in range(writes):
        name = about[:, fact]
        current[rows, name] = (current[rows, name] + steps[:, fact]) % VALUES
        values[:, fact] = FIRST_VALUE + current[rows, name]
        last[rows, name] = fact
    return values, last
