"""Sentences hidden in text: a passkey, or many codes of which one is asked for."""

from __future__ import annotations

from itertools import product

import numpy as np

from data.tasks.filler import Filler, hide
from data.tasks.prompt import Prompt, room_for

_COLOURS = ("amber", "crimson", "indigo", "ivory", "olive", "scarlet", "silver", "violet")
_ANIMALS = ("badger", "falcon", "heron", "marten", "otter", "raven", "salmon", "weasel")
HOLDERS = tuple(f"{colour} {animal}" for colour, animal in product(_COLOURS, _ANIMALS))
"""64 names, told apart only by both words together."""


def passkey_prompt(
    rng: np.random.Generator, filler: Filler, *, length: int, depth: float
) -> Prompt:
    """Return a prompt whose answer is a number of five digits, said once at `depth`."""
    key = str(rng.integers(10_000, 100_000))
    fact = f" The passkey is {key}. Remember it: {key} is the passkey."
    question = " What was the passkey? The passkey is"
    answer = f" {key}"
    room = room_for(filler.encode, length, question, (answer,))
    hidden = hide(rng, filler, [fact], [depth], room, [0])
    return Prompt(
        "passkey", hidden.document, question, answer, None, length, depth, None, hidden.starts
    )


def recall_prompt(
    rng: np.random.Generator, filler: Filler, *, length: int, pairs: int, overwrites: int = 0
) -> Prompt:
    """Return a prompt with `pairs` codes at random places, one of them asked for.

    overwrites: as many of the names (any, also one several times) are given another code later
    on, and the question is about one of these: the last code counts.
    """
    assert 1 <= pairs <= len(HOLDERS)
    holders = rng.permutation(len(HOLDERS))[:pairs]
    again = rng.integers(0, pairs, overwrites)
    about = rng.permutation(np.concatenate([np.arange(pairs), again]))
    codes = rng.permutation(np.arange(100, 1000))[: len(about)]  # all different
    asked = int(again[0]) if overwrites else int(rng.integers(pairs))
    last = int(np.nonzero(about == asked)[0].max())
    facts = [
        f" The code of the {HOLDERS[holders[name]]} is {code}."
        for name, code in zip(about, codes, strict=True)
    ]
    question = f" Which code was the last one given? The code of the {HOLDERS[holders[asked]]} is"
    answer = f" {codes[last]}"
    room = room_for(filler.encode, length, question, (answer,))
    depths = np.sort(rng.random(len(facts))).tolist()
    hidden = hide(rng, filler, facts, depths, room, [last])
    return Prompt(
        "recall", hidden.document, question, answer, None, length, None, pairs, hidden.starts
    )
