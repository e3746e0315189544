"""Naming what failed, where one test loops over several cases: of one model, of one process."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def case(*names: object) -> Iterator[None]:
    """Add the case's names to whatever is raised inside; they travel with a rank's traceback."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the case {' '.join(map(str, names))}")
        raise
