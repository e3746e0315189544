"""Python's own standard library as a corpus: real, long, on every machine, offline."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.sources import Joined

# Small modules are joined until a document holds this much, so that nearly all of them are
# longer than a segment; a package that is larger is a document of its own.
DOCUMENT_BYTES = 64 << 10
# Tests and their fixtures are odd on purpose; the rest is not part of every installation.
_LEFT_OUT = {
    "__pycache__",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "turtledemo",
}


def stdlib_documents() -> list[Joined]:
    """Return the documents of the running Python's standard library, in one fixed order.

    Top-level modules and packages (with their subpackages) in alphabetical order, about 80
    documents and 11 MB. ValueError where the sources are not installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    units = list(_units(root)) if root.is_dir() else []
    if not units:
        raise ValueError(
            f"the standard library's sources are not in {root}; install them, or give"
            f" `longhaul prepare` a text file or a folder"
        )
    documents: list[Joined] = []
    waiting: list[tuple[Path, int]] = []
    for unit in units:
        if sum(size for _, size in unit) >= DOCUMENT_BYTES:
            documents.append(_joined(root, unit))
            continue
        waiting += unit
        if sum(size for _, size in waiting) >= DOCUMENT_BYTES:
            documents.append(_joined(root, waiting))
            waiting = []
    if waiting:
        documents.append(_joined(root, waiting))
    return documents


def _units(root: Path) -> Iterator[list[tuple[Path, int]]]:
    for entry in sorted(root.iterdir()):
        # _sysconfigdata is generated: it holds the build machine's paths.
        if entry.suffix == ".py" and not entry.name.startswith("_sysconfigdata"):
            yield [(entry, entry.stat().st_size)]
        elif entry.name not in _LEFT_OUT and (entry / "__init__.py").is_file():
            yield [(path, path.stat().st_size) for path in _modules(entry)]


def _modules(package: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(package):
        subfolders[:] = sorted(set(subfolders) - _LEFT_OUT)
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


def _joined(root: Path, unit: list[tuple[Path, int]]) -> Joined:
    paths = tuple(path for path, _ in unit)
    name = f"stdlib:{paths[0].relative_to(root)}"
    return Joined(name, root, paths, sum(size for _, size in unit))
