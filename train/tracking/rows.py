"""Files of rows, one JSON object a line, as a run appends them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class RowFile:
    """A file of rows that are appended; what cannot be written waits for the next."""

    def __init__(self, path: Path) -> None:
        self.path, self._waiting = path, b""

    def add(self, row: Mapping[str, object]) -> None:
        """Append a row, behind those that wait; a file system that is away ends no run."""
        self._waiting += json.dumps(row).encode() + b"\n"
        with contextlib.suppress(OSError):
            self.flush()

    def flush(self) -> None:
        """Write what waits; OSError where that fails."""
        if not self._waiting:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            while self._waiting:
                self._waiting = self._waiting[file.write(self._waiting) :]


def read_rows(path: Path, tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return a file's rows, none where there is no file; tail_bytes: only those in its end.

    What is no row is passed over; see rows_of.
    """
    try:
        with path.open("rb") as file:
            if tail_bytes is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - tail_bytes))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    return rows_of(lines)


def rows_of(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return the rows among lines.

    What is no JSON object was cut short by a crash, with or without the next row on its line, and
    is passed over.
    """
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
