"""Runs that only read: the loader and the ledger of every data-parallel rank, no model."""

from pathlib import Path

from data.index import Corpus
from data.ledger import Header, Ledger, next_attempt
from data.loader import load
from data.streams import Streams
from tests.data.corpora import open_numbers

LENGTHS = [17, 1, 40, 3, 9, 26, 2, 33, 12, 8, 51, 5, 64, 20]


def corpus_in(folder: Path) -> Corpus:
    return open_numbers(folder / "corpus", LENGTHS)


def consume(
    corpus: Corpus,
    folder: Path,
    *,
    first: int,
    last: int,
    lanes: int = 12,
    dp_size: int = 1,
    workers: int = 0,
    micro_batch: int = 1,
    seed: int = 5,
    torn: int = 0,
) -> None:
    """Do steps first + 1 to last of a run as one attempt; torn: ranks that get one step further."""
    streams = Streams(corpus.lengths, seed=seed, lanes=lanes, segment_len=4, segments=3)
    attempt = next_attempt(folder)
    for rank in range(dp_size):
        steps = load(
            corpus,
            streams,
            position=first * lanes,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch=micro_batch,
            workers=workers,
            steps=last - first + (rank < torn),
        )
        header = Header(
            attempt=attempt,
            dp_rank=rank,
            dp_size=dp_size,
            position=first * lanes,
            samples=lanes // dp_size,
            batch_size=lanes,
            order={"seed": seed},
        )
        ledger = Ledger(folder, header)
        for _ in ledger.recording(steps):
            pass
        ledger.close()
