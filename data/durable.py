"""Files that are complete or invisible, on disk when a call returns."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


def write_atomically(
    path: Path, content: bytes | str, *, mode: int = 0o666, rivals: bool = False
) -> None:
    """Write a whole file: afterwards it holds the old content or the new, never a mixture.

    Every name in its folder is on disk, too. Text is written as UTF-8. mode: of the file, less the
    umask. rivals: other processes of this machine may write it at the same moment, and the last
    one's stays; what a kill leaves beside it is then not taken over by the next write.
    """
    own = f".{os.getpid()}" if rivals else ""
    temporary = path.with_name(f"{path.name}{own}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            replace_durably(temporary, path, stream)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def replace_durably(temporary: Path, path: Path, stream: BinaryIO) -> None:
    """Give what `stream` wrote under a temporary name its own: complete or invisible."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or a folder's names, to disk: a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
