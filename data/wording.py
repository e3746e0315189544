"""Numbers as messages say them."""

_UNITS = ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k"))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 shard`, `1,024 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short_tokens(number: int) -> str:
    """Return a number of tokens as a user writes it: `16M` for 16777216, `2500` for 2500."""
    for unit, letter in _UNITS:
        if number and number % unit == 0:
            return f"{number // unit}{letter}"
    return str(number)
