"""A corpus behind a URL: fetched through a cache, with retries, each counted and said."""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

from data.cache import Cache, WrongBytes
from data.files import Files, LocalFiles, OpenFile
from data.shards import INDEX_SUFFIX, MANIFEST, Manifest, Shard, index_bytes
from data.urls import shown_url, url_of

_LOG = logging.getLogger("longhaul.data")
_PIECE = 1 << 20
_THREADS = 16  # for indices: many small files, each a wait for the network
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
# The same wrong bytes again are what lies there, and each try is a whole shard.
_WRONG_BYTES = 3
# What asking again may mend: too early, too many, and whatever a gateway says of those behind it.
_PASSING = (408, 425, 429, 500, 502, 503, 504)

T = TypeVar("T")


class FetchError(ValueError):
    """A URL that could not be read, however often: never taken for a damaged file."""


class Missing(OSError):
    """A file that is not there, as its server says."""


class Patience(NamedTuple):
    """How long to go on with an address that does not answer."""

    attempts: int = 10
    timeout_s: float = 60.0  # without a byte


class Remote(NamedTuple):
    """What URLs are read with."""

    cache: Cache
    patience: Patience = Patience()
    say: Callable[[str], None] = _LOG.warning  # told each attempt that failed


class RemoteFiles:
    """The files of a corpus below a URL."""

    def __init__(self, url: str, remote: Remote) -> None:
        """Raise ValueError where nothing here reads such a URL."""
        self.where = shown_url(url)
        self._url, self._say = url, remote.say
        self._cache, self._patience = remote.cache, remote.patience
        self._read_from = _reader(url, remote.patience.timeout_s)

    def manifest(self) -> Manifest:
        """Return the corpus's manifest; ValueError where there is no good one."""
        content = io.BytesIO()

        def fetch() -> None:
            content.seek(0)
            content.truncate()
            for piece in self._read_from(joined(self._url, MANIFEST), 0)[1]:
                content.write(piece)

        try:
            self._patiently(MANIFEST, fetch)
        except OSError as error:
            raise ValueError(
                f"{self.shown(MANIFEST)} cannot be read ({error}); name the address of a folder"
                " that `longhaul prepare` wrote, such as .../train"
            ) from error
        return Manifest.parse(content.getvalue(), self.shown(MANIFEST))

    def shown(self, name: str) -> str:
        """Return the file's URL, without what may be secret in it."""
        return f"{self.where.rstrip('/')}/{name}"

    def read(self, name: str, sha256: str, about: int) -> bytes:
        """Return a whole small file, from the cache where it is there and undamaged."""
        about = min(about, self._cache.limit_bytes)
        content = b""
        for _ in range(2):
            file = self._fetched(name, sha256, about, exact=False)
            content = file.read(file.size(), 0)
            if hashlib.sha256(content).hexdigest() == sha256:
                break
            self._cache.discard(sha256)  # the copy was damaged since it came
        return content

    def open(self, shard: Shard) -> OpenFile:
        """Return a shard's file in the cache, fetched first where it is not there.

        Opened anew for each read: an evicted file that stays open would still take its space.
        """
        return self._fetched(shard.name, shard.sha256, shard.bytes, exact=True)

    def fault(self, shard: Shard) -> str | None:
        """Return None: what is wrong with a shard is found when it is fetched."""
        return None

    def unlisted(self, manifest: Manifest) -> list[str]:
        """Return nothing: a URL cannot be listed, and nothing unlisted is ever read."""
        return []

    def fetch_indices(self, manifest: Manifest) -> None:
        """Fetch every index that is not in the cache, many at once."""

        def fetch(shard: Shard) -> None:
            try:
                self.read(shard.name + INDEX_SUFFIX, shard.index_sha256, index_bytes(shard))
            except OSError:
                pass  # who reads it finds that out again, and has words for it

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="longhaul-index") as pool:
            list(pool.map(fetch, manifest.shards))

    def discard(self, shard: Shard) -> bool:
        """Forget the cache's copy of a shard; it is fetched anew when it is opened."""
        self._cache.discard(shard.sha256)
        return True

    def _fetched(self, name: str, sha256: str, size: int, *, exact: bool) -> OpenFile:
        def fill(part: int) -> None:
            self._fill(joined(self._url, name), part, size if exact else None)

        return self._patiently(name, lambda: self._cache.open(sha256, size, fill, exact=exact))

    def _fill(self, url: str, part: int, size: int | None) -> None:
        """Write a file to a descriptor, from where it ends now on."""
        held = os.fstat(part).st_size
        if size is None or held > size:
            held = 0
        if held == size:
            return
        start, pieces = self._read_from(url, held)
        os.ftruncate(part, start)
        os.lseek(part, start, os.SEEK_SET)
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[os.write(part, view) :]
        found = os.fstat(part).st_size
        if size is not None and found < size:
            raise ConnectionError(f"the connection ended after {found} of {size} bytes")

    def _patiently(self, name: str, action: Callable[[], T]) -> T:
        """Return what the action returns, tried again for as long as there is patience.

        Raises FetchError after that, or where this node may not read or store it; Missing and
        WrongBytes where that is what lies there.
        """
        began, wrong = time.monotonic(), 0
        attempts = self._patience.attempts
        for attempt in range(1, attempts + 1):
            try:
                return action()
            except Missing:
                raise
            except PermissionError as error:
                raise FetchError(
                    f"{self.shown(name)} may not be read here: {error}; see to it, and start the"
                    " run again: it goes on from its newest checkpoint"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                problem: Exception = error
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise FetchError(
                        f"{self.shown(name)} cannot be kept: the disk of data.cache_dir ="
                        f" {self._cache.folder} is full; lower data.cache_bytes ="
                        f" {self._cache.limit_bytes}, or make room"
                    ) from error
                wrong += isinstance(error, WrongBytes)
                if wrong == _WRONG_BYTES:
                    raise
            if attempt < attempts:
                self._cache.count(retries=1)
                pause = _pause(attempt, problem)
                self._say(
                    f"{self.shown(name)}: attempt {attempt} of {attempts} failed"
                    f" ({problem}); again in {pause:.1f} s"
                )
                time.sleep(pause)
        raise FetchError(
            f"{self.shown(name)} could not be read in {attempts} attempts over"
            f" {time.monotonic() - began:.0f} s, at last: {problem}; see whether this node reaches"
            " that address, raise data.fetch_attempts or data.fetch_timeout_s, and start the run"
            " again: it goes on from its newest checkpoint"
        )


class Busy(OSError):
    """A server that asks to come again later."""

    def __init__(self, text: str, after_s: float | None) -> None:
        super().__init__(text)
        self.after_s = after_s


def _pause(attempt: int, problem: Exception) -> float:
    """Return how long to wait: doubled each time, spread so that ranks do not come together."""
    if isinstance(problem, Busy) and problem.after_s is not None:
        return min(problem.after_s, _LONGEST_PAUSE_S)
    longest = min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S)
    return float(longest * random.uniform(0.5, 1.0))


Reader = Callable[[str, int], tuple[int, Iterator[bytes]]]
"""(url, start) -> (where the pieces begin: start, or 0 where the server cannot; the pieces)."""


def _reader(url: str, timeout_s: float) -> Reader:
    if urlsplit(url).scheme in ("http", "https"):
        return lambda address, start: _read_http(address, start, timeout_s)
    return _open_fsspec(url)


def _read_http(url: str, start: int, timeout_s: float) -> tuple[int, Iterator[bytes]]:
    headers = {"User-Agent": "longhaul", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error) from error
    except urllib.error.URLError as error:
        raise ConnectionError(str(error.reason)) from error
    partial = response.status == 206
    if partial and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        response.close()
        raise ConnectionError(f"asked from byte {start} on, the server sent something else")
    # read1: what has come, not a whole piece; a stall must not lose it
    return (start if partial else 0), _pieces(response, response.read1)


def _refusal(error: urllib.error.HTTPError) -> OSError:
    said = f"HTTP {error.code} {error.reason}"
    if error.code in _PASSING:
        after = error.headers.get("Retry-After", "")
        return Busy(said, float(after) if after.isdigit() else None)
    if error.code in (404, 410):
        return Missing(said)
    if error.code == 416:  # a longer piece is here than there: the file there is another one
        return WrongBytes(said)
    return PermissionError(said)


def _pieces(file: Any, read: Callable[[int], bytes]) -> Iterator[bytes]:
    with file:
        while piece := read(_PIECE):
            yield piece


def _open_fsspec(url: str) -> Reader:
    import fsspec  # 0.1 s, and only such addresses need it

    scheme = urlsplit(url).scheme
    try:
        system, _ = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(
            f"{shown_url(url)}: {error}; install it into this environment, on every node"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{shown_url(url)}: nothing here reads {scheme}:// ({error}); use http(s)://, s3:// or"
            " another scheme of fsspec"
        ) from error

    def read(address: str, start: int) -> tuple[int, Iterator[bytes]]:
        try:
            file = system.open(address, "rb", cache_type="none")
            file.seek(start)
        except FileNotFoundError as error:
            raise Missing(f"no such file: {error}") from error
        except OSError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        return start, _foreign_pieces(file)

    return read


def _foreign_pieces(file: Any) -> Iterator[bytes]:
    try:
        yield from _pieces(file, file.read)
    except OSError:
        raise
    except Exception as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def joined(url: str, name: str) -> str:
    """Return the URL of a file in a folder; a query, such as a signature, stays at the end."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def open_files(folder: str | Path, remote: Remote | None) -> Files:
    """Return the files of a corpus: of a folder, or of a URL as `remote` says.

    Raises ValueError for a URL where there is no cache for it.
    """
    url = url_of(folder)
    if url is None:
        return LocalFiles(Path(folder))
    if remote is None:
        raise ValueError(
            f"{shown_url(url)} is a URL, and there is no cache for it; set data.cache_dir to a"
            " folder on a disk of this node"
        )
    return RemoteFiles(url, remote)
