"""Imports without what a library imports for itself, and nobody here uses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Let imports of these packages fail meanwhile, as where they are not installed.

    What was imported before stays.
    """
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: an ImportError
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
