"""What rules are made of: the rule itself, and the nearest values that keep it."""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Rule(NamedTuple):
    """One rule: where its message is shown, what it reads, and the check."""

    path: str
    needs: tuple[str, ...]
    check: Callable[..., str | None]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known word that is closest, "" if none is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest_multiples(value: int, of: int) -> str:
    """Return the multiples of `of` next to value, nearest first, as `32 or 48`."""
    below = value // of * of
    return nearest({below, below + of} - {0}, value)


def nearest_divisors(value: int, of: int, least: int = 1) -> str:
    """Return the divisors of `of`, from `least` on, next to value, nearest first: `2 or 4`."""
    small = [number for number in range(1, math.isqrt(of) + 1) if of % number == 0]
    divisors = {*small, *(of // number for number in small)}
    return nearest((number for number in divisors if number >= least), value)


def nearest(numbers: Iterable[int], value: int) -> str:
    """Return the number next to value on each side, nearest first, as `2 or 4`."""
    numbers = set(numbers)
    below = sorted(number for number in numbers if number <= value)[-1:]
    above = sorted(number for number in numbers if number > value)[:1]
    near = sorted(below + above, key=lambda number: abs(number - value))
    return " or ".join(map(str, near))


def not_multiple(value: int, of: int, name: str, otherwise: str = "") -> str | None:
    """Return the problem of a value that is no multiple; name says what `of` is."""
    if value % of == 0:
        return None
    use = nearest_multiples(value, of) + (f", or {otherwise}" if otherwise else "")
    return f"{value} is not a multiple of {name} = {of}; use {use}"
