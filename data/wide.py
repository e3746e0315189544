"""A corpus too large for its index to be in memory: a shard's is read where its documents are.

Opening reads the manifest alone. `scan` is the one pass over all indices: how many segments each
shard holds has to be known before the first sample, and nothing else of them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from data.files import Files
from data.index import OnDamage, Shards, Table, foreign, read_index
from data.passes import Int64Array, count_segments
from data.remote import Remote, open_files
from data.shards import Manifest, Shard

# Tables used last stay, whoever holds them: readers come back to a document segment by segment.
_TABLES = 16
# Of a pass over all indices: it waits for the file system, and hashing releases the lock.
_THREADS = 8


class WideCorpus(Shards):
    """Documents of a prepared folder whose index is read shard by shard.

    A table stays in memory for as long as a window of the order holds it; each time it is read,
    the crc32 of its documents is verified anew. An index that cannot be read is an error whatever
    on_damage says: without lengths there is no order.
    """

    def __init__(self, files: Files, manifest: Manifest, on_damage: OnDamage) -> None:
        super().__init__(files, manifest, manifest.shards, [], on_damage)
        self._held: weakref.WeakValueDictionary[int, Table] = weakref.WeakValueDictionary()
        self._recent: dict[int, Table] = {}
        self._reading = threading.Lock()

    @classmethod
    def open(
        cls, folder: str | Path, on_damage: OnDamage = "stop", remote: Remote | None = None
    ) -> WideCorpus:
        """Return the corpus in `folder`; ValueError where there is no good manifest."""
        files = open_files(folder, remote)
        manifest = files.manifest()
        if not manifest.documents:
            raise ValueError(f"{folder} holds no document; run `longhaul prepare` first")
        return cls(files, manifest, on_damage)

    def table(self, number: int) -> Table:
        """Return the index of a shard; ValueError where it is missing or another's."""
        table = self._held.get(number)
        if table is None:
            with self._reading:  # one reader: those who wait want the same, in most cases
                table = self._held.get(number)
                if table is None:
                    shard = self._shards[number]
                    table = Table(shard, read_index(self._files, shard, self._dtype))
                    self._held[number] = table
                    self._recent[number] = table
                    while len(self._recent) > _TABLES:
                        del self._recent[next(iter(self._recent))]
        return table

    def check(self) -> None:
        """Look at every shard's file, without reading it.

        Raises ValueError for the first foreign, missing or resized one; with on_damage="skip"
        they are listed in `damage`, and their documents are found damaged when they are read.
        """
        damage = [foreign(self._files.shown(name)) for name in self._files.unlisted(self.manifest)]
        with ThreadPoolExecutor(_THREADS) as pool:
            damage += filter(None, pool.map(self._files.fault, self._shards))
        if damage and self._on_damage == "stop":
            more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
            raise ValueError(damage[0] + more)
        with self._lock:
            self._damage += damage

    def scan(
        self, segment_len: int, done: Callable[[int], object] = lambda count: None
    ) -> Int64Array:
        """Return the segments of each shard, after one pass over all indices.

        done: told the number of shards that were looked at, one by one. Raises ValueError for an
        index that is missing or another's.
        """
        counts = np.zeros(len(self._shards), dtype=np.int64)
        count = partial(_count, self._files, self._dtype, segment_len)
        with ThreadPoolExecutor(_THREADS) as pool:
            for number, segments in enumerate(pool.map(count, self._shards)):
                counts[number] = segments
                done(1)
        return counts


def _count(files: Files, dtype: np.dtype[np.void], segment_len: int, shard: Shard) -> int:
    lengths = read_index(files, shard, dtype)["length"]
    return int(count_segments(lengths, segment_len).sum())


class ShardSource:
    """A wide corpus as its order sees it: a block is a shard."""

    def __init__(self, corpus: WideCorpus, segments: Int64Array) -> None:
        """segments: of each shard, as `scan` counts them."""
        self.documents = corpus.documents
        self.segments = segments
        self.first, self.block, self.length = corpus.first, corpus.table, corpus.length
