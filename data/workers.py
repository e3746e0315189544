"""The processes of a prepare: blocks go out, token arrays come back in the same order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.shards import TokenArray
from data.sources import Block
from data.split import Side, Split
from data.tokenizer import Tokenizer, load_tokenizer

# What may be under way at once: two blocks a worker, but a book of 100 MB is one block.
_BLOCKS_AHEAD = 2
_BYTES_AHEAD = 64 << 20


class Job(NamedTuple):
    """A block to tokenise, and what of it is in finished shards already."""

    number: int
    source: int
    block: Block
    done: dict[Side, int]  # so many documents of this block each side has already


class Tokenized(NamedTuple):
    """The new documents of a block: (index in the block, side, tokens); and its counts."""

    documents: list[tuple[int, Side, TokenArray]]
    found: int
    empty: int


def in_order(
    jobs: Iterator[Job], tokenizer: Path, sha256: str, split: Split, workers: int
) -> Iterator[tuple[Job, Tokenized]]:
    """Yield the jobs with their results, in the order of the jobs."""
    if workers == 1:
        for job in jobs:
            yield job, tokenize(job.block, job.done, tokenizer, sha256, split)
        return
    # spawn: a fork would copy the locks of threads that tokenizer training left behind.
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    pending: deque[tuple[Job, Future[Tokenized]]] = deque()
    pending_bytes = 0
    try:
        while True:
            while len(pending) < _BLOCKS_AHEAD * workers and (
                not pending or pending_bytes < _BYTES_AHEAD * workers
            ):
                coming = next(jobs, None)
                if coming is None:
                    break
                arguments = (coming.block, coming.done, tokenizer, sha256, split)
                pending.append((coming, pool.submit(tokenize, *arguments)))
                pending_bytes += coming.block.size
            if not pending:
                return
            job, future = pending.popleft()
            yield job, future.result()
            pending_bytes -= job.block.size
    except BrokenProcessPool as error:
        raise ValueError(
            f"a worker process was killed, probably out of memory ({workers} workers); run the"
            f" same command with fewer --workers: it continues behind the last shard"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # The parent hears Ctrl-C and stops its workers; the library's own threads would be
    # workers times cores.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed closes no queue: without this its workers wait for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@lru_cache(maxsize=1)
def _load(tokenizer: Path, sha256: str) -> Tokenizer:
    # sha256 is part of the key: --force may put another tokenizer under the same path.
    loaded = load_tokenizer(tokenizer)
    assert loaded.sha256 == sha256
    return loaded


def tokenize(
    block: Block, done: Mapping[Side, int], tokenizer: Path, sha256: str, split: Split
) -> Tokenized:
    """Return the block's documents that their side has not got yet, closed with the end id."""
    loaded = _load(tokenizer, sha256)
    documents: list[tuple[int, Side, TokenArray]] = []
    found = empty = 0
    for index, document in enumerate(block.documents()):
        found += 1
        if not document.text.strip():
            empty += 1
            continue
        side = split.side(split.identity(document.text))
        if index < done[side]:
            continue
        tokens = loaded.encode(document.text)
        if len(tokens) == 0:
            raise ValueError(
                f"{document.name}: tokenizer {loaded.name} makes no token of a text of"
                f" {len(document.text)} characters; use one that knows these characters"
            )
        end = np.array([loaded.end_of_document], dtype=tokens.dtype)
        documents.append((index, side, np.concatenate([tokens, end])))
    return Tokenized(documents, found, empty)
