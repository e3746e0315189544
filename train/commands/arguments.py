"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="The run's YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE...",
        help="Values to change, by dotted key: train.steps=50 data.segment_len=32k.",
        show_default=False,
    ),
]


def token_option(option: str, text: str) -> int:
    """Return a length such as 32k; ValueError, with the option's name, where it is none."""
    from train.settings.units import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
