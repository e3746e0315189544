"""Reading batches ahead of the training loop, in an order that nothing can change.

Threads, not processes: reading and crc32 release the interpreter's lock, a batch needs no
copy through a pipe, and a dying job leaves nobody behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from functools import partial
from itertools import count
from queue import SimpleQueue
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from data.documents import Documents
from data.streams import IGNORE, Batch, Run, Streams, Stretch

# Steps read ahead for each worker: one in the making and one ready.
_AHEAD = 2
# Between two looks at whether to go on waiting for a step.
_LOOK_UP_S = 0.5


def load(
    corpus: Documents,
    streams: Streams,
    *,
    position: int,
    dp_rank: int,
    dp_size: int,
    micro_batch: int,
    workers: int = 1,
    steps: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Generator[list[Batch], None, None]:
    """Return an iterator over steps: each item is this rank's micro-batches, in order.

    Starts at `position` (samples consumed by the whole run) and ends after `steps` steps,
    or never. TP and CP peers pass the same dp_rank and get the same data. `workers` threads
    read ahead (0: none, each step is read when asked for) and never change the order; what
    one of them raises is raised here, at the step it belongs to. Closing the iterator stops
    them. stopped: asked while a step is waited for; once it says so the iterator ends, and a
    worker that hangs is left behind.

    Raises ValueError where the lanes cannot be shared out, or position is inside a step.
    """
    lanes = streams.lanes
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank={dp_rank} is not a rank of dp_size={dp_size}")
    if lanes % dp_size:
        raise ValueError(
            f"train.batch_size={lanes} is not a multiple of dp_size={dp_size} (every rank"
            f" reads the same number of streams); use {-(-lanes // dp_size) * dp_size}"
        )
    per_rank = lanes // dp_size
    if micro_batch < 1 or per_rank % micro_batch:
        fitting = max(
            n for n in range(1, per_rank + 1) if per_rank % n == 0 and (n <= max(micro_batch, 1))
        )
        raise ValueError(
            f"train.micro_batch={micro_batch} does not divide the {per_rank} streams of a rank"
            f" (batch_size={lanes} over dp_size={dp_size}); use {fitting}"
        )
    if position < 0 or position % lanes:
        raise ValueError(
            f"position={position} is not a multiple of train.batch_size={lanes}: the run was"
            f" saved with another batch_size; use that one, or start a new run"
        )
    if workers < 0:
        raise ValueError(f"data.workers={workers} must be at least 0")
    if corpus.documents != streams.documents:
        raise ValueError(
            f"the streams were made for {streams.documents} documents, the corpus holds"
            f" {corpus.documents}; build Streams from corpus.lengths"
        )
    first = position + dp_rank * per_rank
    rows = [first + row for row in range(0, per_rank, micro_batch)]
    reader = _Reader(corpus, streams, rows, micro_batch)
    numbers = iter(range(steps)) if steps is not None else count()
    if workers:
        return _ahead(reader, numbers, workers, stopped)
    return _one_by_one(reader, numbers)


class _Reader:
    """Builds any step of one rank, from its number alone."""

    def __init__(
        self, corpus: Documents, streams: Streams, rows: list[int], micro_batch: int
    ) -> None:
        self._corpus = corpus
        self._streams = streams
        self._rows = rows
        self._micro_batch = micro_batch

    def step(self, number: int) -> list[Batch]:
        """Return the micro-batches of the step `number` after the first one."""
        return [
            assemble(
                self._corpus,
                self._streams,
                row + number * self._streams.lanes,
                self._micro_batch,
            )
            for row in self._rows
        ]


def _one_by_one(reader: _Reader, numbers: Iterator[int]) -> Generator[list[Batch], None, None]:
    for number in numbers:
        yield reader.step(number)


class _Workers:
    """Threads that do what they are given, in order, and keep no process from ending.

    An executor's threads are joined at exit, where a read that hangs would hold up the process
    for minutes after its last checkpoint.
    """

    def __init__(self, number: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[list[Batch]], Callable[[], list[Batch]]] | None]
        self._tasks = SimpleQueue()
        self._threads = [
            Thread(target=self._work, name=f"longhaul-data_{index}", daemon=True)
            for index in range(number)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], list[Batch]]) -> Future[list[Batch]]:
        """Return what will hold the task's result, or what it raises."""
        future: Future[list[Batch]] = Future()
        self._tasks.put((future, task))
        return future

    def close(self, *, wait: bool) -> None:
        """Let the threads end, and wait for them if asked; nobody waits for a result any more."""
        for _ in self._threads:
            self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        while (given := self._tasks.get()) is not None:
            future, task = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:  # raised where the step is asked for
                future.set_exception(error)


def _ahead(
    reader: _Reader, numbers: Iterator[int], workers: int, stopped: Callable[[], bool]
) -> Generator[list[Batch], None, None]:
    pool = _Workers(workers)
    pending: deque[Future[list[Batch]]] = deque()
    try:
        while True:
            for number in numbers:
                pending.append(pool.submit(partial(reader.step, number)))
                if len(pending) > _AHEAD * workers:
                    break
            if not pending:
                return
            while not wait([pending[0]], _LOOK_UP_S).done:
                if stopped():
                    return
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        pool.close(wait=not stopped())


def assemble(corpus: Documents, streams: Streams, position: int, rows: int) -> Batch:
    """Return the samples position .. position + rows - 1 as one batch."""
    import torch  # here, so that `longhaul prepare` and its workers start without torch

    shape = (rows, streams.segments, streams.segment_len)
    # Empty, and padded only where nothing is read: these copies are what a batch costs.
    tokens = np.empty(shape, dtype=np.int64)
    labels = np.empty(shape, dtype=np.int64)
    starts = np.ones(shape[:2], dtype=np.bool_)
    offsets = np.zeros(shape[:2], dtype=np.int64)
    documents = np.zeros(shape, dtype=np.int64) if streams.packs else None
    for row in range(rows):
        last = 0
        for stretch in streams.stretches(position + row):
            first, last = stretch.first, stretch.first + stretch.segments
            starts[row, first:last] = False
            starts[row, first] = stretch.starts
            offsets[row, first:last] = np.arange(stretch.start, stretch.stop, streams.segment_len)
            at = tokens[row, first:last].reshape(-1), labels[row, first:last].reshape(-1)
            _fill(corpus, stretch, *at)
            if documents is not None and stretch.behind:
                _fill_behind(corpus, stretch, *at, documents[row, first:last].reshape(-1))
        tokens[row, last:], labels[row, last:] = corpus.end_of_document, IGNORE
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(starts),
        torch.from_numpy(offsets),
        position,
        None if documents is None else torch.from_numpy(documents),
    )


def _fill_behind(
    corpus: Documents,
    stretch: Stretch,
    tokens: NDArray[np.int64],
    labels: NDArray[np.int64],
    documents: NDArray[np.int64],
) -> None:
    """Write the documents behind a stretch, each up to the end of its last segment."""
    place = stretch.stop - stretch.start
    for number, run in enumerate(stretch.behind, 1):
        _fill(corpus, run, tokens[place:], labels[place:])
        documents[place:] = number
        place += run.stop


def _fill(
    corpus: Documents,
    run: Stretch | Run,
    tokens: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> None:
    """Write tokens [start, stop) of a document and what follows each; padding behind them."""
    num_tokens = num_labels = 0
    # A damaged document is skipped and named by the corpus; padding keeps its place.
    if corpus.intact(run.document):
        after = min(run.stop + 1, corpus.length(run.document))
        content = corpus.read_stored(run.document, run.start, after)
        num_tokens, num_labels = run.stop - run.start, after - run.start - 1
        tokens[:num_tokens] = content[:num_tokens]
        labels[:num_labels] = content[1:]
    tokens[num_tokens:] = corpus.end_of_document
    labels[num_labels:] = IGNORE
