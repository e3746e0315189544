"""What configuration sections are made of: their base class and the types of their fields.

Each type is `Annotated` for pydantic and is a plain `int` or `float` to everyone else. Token
lengths (`32k`) and durations (`30min`) work alike in YAML and in an override, and a resolved
configuration prints plain numbers.
"""

import math
import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_TOKENS = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)")
_TOKEN_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_BYTE_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(?:i?B)?")
_BYTE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h|d)\s*")
_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_whole(value: object) -> int:
    """Return a whole number from an int, or from text or a float that is one (`1e4`)."""
    number = _number(value)
    if number is None or not math.isfinite(number) or number != int(number):
        raise ValueError(f"expected a whole number, got {shown(value)}")
    try:
        return int(value)  # type: ignore[call-overload, no-any-return]
    except ValueError:  # text such as 1e4; only there would float lose no digit
        return int(number)


def parse_real(value: object) -> float:
    """Return a finite float; text is read too, because YAML 1.1 takes `3e-4` for text."""
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise ValueError(f"expected a number such as 0.1 or 3e-4, got {shown(value)}")
    return number


def parse_tokens(value: object) -> int:
    """Return a number of tokens from `8192`, `32k` (32768), `1.5k` or `1M` (1048576)."""
    match = _TOKENS.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None:
        tokens = float(match[1]) * _TOKEN_UNITS[match[2].lower()]
        if tokens == int(tokens):
            return int(tokens)
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(
        f"expected a number of tokens such as 8192, 32k (32768) or 1M (1048576), got {shown(value)}"
    )


def parse_names(value: object) -> object:
    """Return the names of `passkey,recall` one by one; what is no text is left as it is."""
    if not isinstance(value, str):
        return value
    return tuple(name for part in value.split(",") if (name := part.strip()))


def parse_bytes(value: object) -> int:
    """Return a number of bytes from `1000000`, `512M` (536870912), `1.5G` or `2T`."""
    match = _BYTE_SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None:
        return int(float(match[1]) * _BYTE_UNITS[match[2].lower()])
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(
        f"expected a number of bytes such as 1000000, 512M, 200G or 2T, got {shown(value)}"
    )


def parse_duration(value: object) -> float:
    """Return seconds from a number of seconds, or from `90s`, `30min`, `1h30min`, `2d`."""
    number = _number(value)
    if number is not None and math.isfinite(number):
        return number
    text = value.strip() if isinstance(value, str) else ""
    if text and re.fullmatch(f"(?:{_DURATION.pattern})+", text):
        return sum(float(part[1]) * _SECONDS[part[2]] for part in _DURATION.finditer(text))
    raise ValueError(
        f"expected a duration such as 90s, 30min, 1h30min or seconds, got {shown(value)}"
    )


def shown(value: object) -> str:
    """Return the value as a problem line quotes it: its repr, on one line and not endless."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]  # as YAML spells them
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(value: object) -> float | None:
    # a bool is an int to Python; `num_layers: true` must not become one layer
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:  # an int beyond all floats
        return math.inf


# limits stand inside the parsers, so that the JSON schema carries them too
Whole = BeforeValidator(parse_whole)
Index = Annotated[int, Field(ge=0), Whole]
Count = Annotated[int, Field(ge=1), Whole]

_NamesText = Annotated[str, Field(pattern=r"^[^,]+(,[^,]+)*$")]
Names = Annotated[
    tuple[str, ...],
    BeforeValidator(parse_names, json_schema_input_type=tuple[str, ...] | _NamesText),
]

_Real = BeforeValidator(parse_real)
Real = Annotated[float, _Real]
Positive = Annotated[float, Field(gt=0), _Real]
NonNegative = Annotated[float, Field(ge=0), _Real]
Probability = Annotated[float, Field(ge=0, le=1), _Real]
Decay = Annotated[float, Field(ge=0, lt=1), _Real]

_AnyCount = Annotated[int, Field(ge=1)]
_TokensText = Annotated[str, Field(pattern=rf"^{_TOKENS.pattern}$")]
TokenLength = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(parse_tokens, json_schema_input_type=_AnyCount | _TokensText),
]
_BytesText = Annotated[str, Field(pattern=rf"^{_BYTE_SIZE.pattern}$")]
ByteSize = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(parse_bytes, json_schema_input_type=_AnyCount | _BytesText),
]
_AnyPositive = Annotated[float, Field(gt=0)]
_DurationText = Annotated[str, Field(pattern=rf"^({_DURATION.pattern})+$")]
Duration = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(parse_duration, json_schema_input_type=_AnyPositive | _DurationText),
]


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
