"""One fact a segment: what stood beside this name?"""

from __future__ import annotations

import numpy as np

from data.tasks.symbols import (
    FIRST_VALUE,
    KEY,
    QUERY,
    VALUES,
    TokenTask,
    ask,
    fill,
    name_rows,
    require_room,
    slots_of,
    write,
)


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
