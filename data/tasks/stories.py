"""Small worlds of people, places and things, told in sentences scattered over other text.

The kind of bAbI's tasks 1, 2, 6 and 7 (Weston et al. 2015), asked over long texts as BABILong
does (Kuratov et al. 2024); world, names, sentences and questions are our own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.tasks.filler import Filler, hide
from data.tasks.prompt import Prompt, room_for

PEOPLE = ("Ivo", "Marta", "Selim", "Greta", "Noor", "Tilda")
PLACES = ("attic", "cellar", "chapel", "orchard", "pantry", "stable")
THINGS = ("basket", "compass", "kettle", "lantern", "ledger", "violin")
NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
_MOVES = ("walked to", "went over to", "headed for", "returned to")
_TAKES = ("picked up", "took", "got hold of")
_DROPS = ("put down", "left behind", "let go of")


class Fact(NamedTuple):
    """One sentence of a story: who did what with which place or thing."""

    who: int
    kind: str  # move, take, drop
    what: int


@dataclass
class World:
    """Where everybody is and what they hold, and the facts that say so."""

    facts: list[Fact] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)  # person -> fact of the last move
    taken: dict[int, int] = field(default_factory=dict)  # thing -> fact of the last taking
    dropped: dict[int, tuple[int, int]] = field(default_factory=dict)  # thing -> drop, its move

    def holder(self, thing: int) -> int | None:
        """Return who holds a thing."""
        if thing not in self.taken or thing in self.dropped:
            return None
        return self.facts[self.taken[thing]].who

    def held(self, person: int) -> list[int]:
        """Return what a person holds."""
        return [thing for thing in self.taken if self.holder(thing) == person]

    def add(self, fact: Fact) -> None:
        """Let something happen."""
        number = len(self.facts)
        self.facts.append(fact)
        if fact.kind == "move":
            self.place[fact.who] = number
        elif fact.kind == "take":
            self.taken[fact.what] = number
            self.dropped.pop(fact.what, None)
        else:
            self.dropped[fact.what] = (number, self.place[fact.who])

    def where(self, thing: int) -> tuple[int, tuple[int, ...]] | None:
        """Return a thing's place and the facts that tell it, None where it is not known."""
        if thing in self.dropped:
            drop, move = self.dropped[thing]
            return self.facts[move].what, (move, drop)
        holder = self.holder(thing)
        if holder is None or holder not in self.place:
            return None
        return self.facts[self.place[holder]].what, (self.place[holder], self.taken[thing])


class _Asked(NamedTuple):
    question: str
    answer: str
    choices: tuple[str, ...]
    needed: tuple[int, ...]


def story_prompt(
    rng: np.random.Generator, filler: Filler, *, task: str, length: int, facts: int = 8
) -> Prompt:
    """Return a prompt of one of STORIES: `facts` sentences at random places, one-word answer."""
    if facts < 2:
        raise ValueError(f"facts={facts} tell no story; use 2 or more")
    while True:  # a few tries: not every world lets this be asked
        world = imagine(rng, facts, things=task in ("story_thing", "story_count"))
        asked = STORIES[task](rng, world)
        if asked:
            break
    choices = tuple(f" {choice}" for choice in asked.choices)
    room = room_for(filler.encode, length, asked.question, choices)
    depths = np.sort(rng.random(facts)).tolist()
    texts = [tell(rng, fact) for fact in world.facts]
    hidden = hide(rng, filler, texts, depths, room, asked.needed)
    answer = f" {asked.answer}"
    return Prompt(
        task, hidden.document, asked.question, answer, choices, length, None, None, hidden.starts
    )


def imagine(rng: np.random.Generator, facts: int, *, things: bool) -> World:
    """Return a world in which `facts` things happened: people move, and take and drop things."""
    world = World()
    while len(world.facts) < facts:
        who = int(rng.integers(len(PEOPLE)))
        kind = str(rng.choice(["move", "take", "drop"], p=[0.5, 0.35, 0.15])) if things else "move"
        if options := _options(world, who, kind):
            world.add(Fact(who, kind, int(rng.choice(options))))
    return world


def _options(world: World, who: int, kind: str) -> list[int]:
    """Return the places or things with which somebody can do this now."""
    here = world.facts[world.place[who]].what if who in world.place else None
    if kind == "move":
        return [place for place in range(len(PLACES)) if place != here]
    if here is None:
        return []
    if kind == "drop":
        return world.held(who)
    lying = {thing: world.where(thing) for thing in world.dropped}
    reached = [thing for thing, found in lying.items() if found and found[0] == here]
    return reached + [thing for thing in range(len(THINGS)) if thing not in world.taken]


def tell(rng: np.random.Generator, fact: Fact) -> str:
    """Return the sentence of a fact."""
    verbs = {"move": _MOVES, "take": _TAKES, "drop": _DROPS}[fact.kind]
    what = (PLACES if fact.kind == "move" else THINGS)[fact.what]
    return f" {PEOPLE[fact.who]} {verbs[rng.integers(len(verbs))]} the {what}."


def _where_person(rng: np.random.Generator, world: World) -> _Asked:
    who = int(rng.choice(list(world.place)))
    move = world.place[who]
    question = f" Where is {PEOPLE[who]} now? {PEOPLE[who]} is in the"
    return _Asked(question, PLACES[world.facts[move].what], PLACES, (move,))


def _where_thing(rng: np.random.Generator, world: World) -> _Asked | None:
    if not world.taken:
        return None
    thing = int(rng.choice(list(world.taken)))
    found = world.where(thing)
    if found is None:
        return None
    question = f" Where is the {THINGS[thing]} now? The {THINGS[thing]} is in the"
    return _Asked(question, PLACES[found[0]], PLACES, found[1])


def _is_person_there(rng: np.random.Generator, world: World) -> _Asked:
    who = int(rng.choice(list(world.place)))
    move = world.place[who]
    place = true = world.facts[move].what
    if rng.random() < 0.5:
        place = (true + int(rng.integers(1, len(PLACES)))) % len(PLACES)
    question = f" Is {PEOPLE[who]} in the {PLACES[place]} now? Answer:"
    return _Asked(question, "yes" if place == true else "no", ("yes", "no"), (move,))


def _how_many(rng: np.random.Generator, world: World) -> _Asked | None:
    deeds: dict[int, list[int]] = {}
    for number, fact in enumerate(world.facts):
        if fact.kind != "move":
            deeds.setdefault(fact.who, []).append(number)
    if not deeds:
        return None
    who = int(rng.choice(list(deeds)))
    question = (
        f" How many things is {PEOPLE[who]} carrying now? The number of things that"
        f" {PEOPLE[who]} is carrying is"
    )
    return _Asked(question, NUMBERS[len(world.held(who))], NUMBERS, tuple(deeds[who]))


STORIES: dict[str, Callable[[np.random.Generator, World], _Asked | None]] = {
    "story_person": _where_person,  # one supporting fact
    "story_thing": _where_thing,  # two
    "story_yes_no": _is_person_there,
    "story_count": _how_many,
}
"""Tasks by name; each returns None where a world does not let it be asked."""
