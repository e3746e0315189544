"""What the user named on the command line, resolved: which files, in which order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.sources import Block, Document, Joined, file_blocks, is_text
from data.stdlib import stdlib_documents
from data.urls import shown_url, url_of

STDLIB = "stdlib"


@dataclass(frozen=True)
class Source:
    """One input: files to read, or documents joined from files."""

    name: str
    root: Path
    files: tuple[Path, ...] = ()
    joined: tuple[Joined, ...] = ()

    def paths(self) -> Iterator[Path]:
        """Yield every file of this input in order."""
        yield from self.files
        for document in self.joined:
            yield from document.paths

    def blocks(self, text_key: str) -> Iterator[Block]:
        """Yield the pieces of work of this input, in order."""
        yield from file_blocks(self.files, text_key)
        yield from self.joined


@dataclass(frozen=True)
class Inputs:
    """All inputs in the order they were given, and what was found beside text and left out."""

    sources: tuple[Source, ...]
    ignored: tuple[str, ...]
    files: int = field(init=False)
    bytes: int = field(init=False)
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        files = total = 0
        for source in self.sources:
            for path in source.paths():
                status = path.stat()
                name = path.relative_to(source.root)
                line = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
                files += 1
                total += status.st_size
        object.__setattr__(self, "files", files)
        object.__setattr__(self, "bytes", total)
        object.__setattr__(self, "sha256", digest.hexdigest())

    def blocks(self, text_key: str) -> Iterator[tuple[int, Block]]:
        """Yield (number of the input, block) in the order of the corpus."""
        for number, source in enumerate(self.sources):
            for block in source.blocks(text_key):
                yield number, block


def find_inputs(inputs: Sequence[str | Path]) -> Inputs:
    """Return the files behind `inputs`: files, folders (recursively) and the word "stdlib".

    Folders are walked in alphabetical order; hidden files and __pycache__ are passed over,
    files that are not text are listed in `ignored`. Raises ValueError for an input that does
    not exist, has no file, or repeats one.
    """
    if not inputs:
        raise ValueError("no input: name at least one file or folder, or 'stdlib'")
    ignored: list[str] = []
    sources = tuple(_find(item, ignored) for item in inputs)
    seen: dict[Path, str] = {}
    for source in sources:
        for path in source.paths():
            if path in seen:
                raise ValueError(
                    f"{path} comes with {seen[path]!r} and again with {source.name!r}, and"
                    f" would be trained on twice; name it once"
                )
            seen[path] = source.name
    return Inputs(sources, tuple(ignored))


def documents(inputs: Sequence[str | Path], *, text_key: str = "text") -> Iterator[Document]:
    """Yield every document of `inputs` in the order in which prepare sees them."""
    for _, block in find_inputs(inputs).blocks(text_key):
        yield from block.documents()


def _find(item: str | Path, ignored: list[str]) -> Source:
    if item == STDLIB:
        joined = tuple(stdlib_documents())
        return Source(STDLIB, joined[0].root, joined=joined)
    url = url_of(item)
    if url is not None:
        raise ValueError(
            f"input {shown_url(url)} is a URL, and prepare reads local files; copy it to this"
            f" machine first (the shards that prepare writes may be read from a URL)"
        )
    path = Path(item).absolute()
    if path.is_file():
        return Source(str(path), path.parent, files=(path,))
    if not path.is_dir():
        raise ValueError(f"input {str(item)!r} does not exist; name a file or folder, or 'stdlib'")
    files = []
    for found in _walk(path):
        if is_text(found):
            files.append(found)
        else:
            ignored.append(str(found))
    if not files:
        raise ValueError(
            f"input {str(item)!r} holds no text ({len(ignored)} other files): name a folder"
            f" with text, .jsonl or .parquet files (.gz and .zst of them too)"
        )
    return Source(str(path), path, files=tuple(files))


def _walk(folder: Path) -> Iterable[Path]:
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and name != "__pycache__"
        )
        for name in sorted(names):
            path = Path(parent) / name
            if not name.startswith(".") and path.is_file():
                yield path
