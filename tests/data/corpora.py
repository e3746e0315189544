"""Small corpora whose every token is different, so that a test can say which one it got."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from data.index import Corpus
from data.shards import Manifest, write_corpus

END = 0


class Numbers:
    """A vocabulary without text: ids from 1 on, 0 ends a document."""

    end_of_document = END

    def __init__(self, vocab_size: int = 1 << 20) -> None:
        self.vocab_size = vocab_size
        self.name = f"numbers-{vocab_size}"
        self.sha256 = sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return f'{{"numbers": {self.vocab_size}}}'


def write_numbers(
    folder: Path,
    lengths: Sequence[int],
    shard_tokens: int = 64,
    vocab_size: int = 1 << 20,
    first: int = 1,
) -> Manifest:
    """Write documents of these lengths (closing token included); tokens count up from `first`."""
    begins = np.cumsum([first, *(length - 1 for length in lengths)])
    documents = [
        np.arange(begin, begin + length - 1) for begin, length in zip(begins, lengths, strict=False)
    ]
    tokenizer = Numbers(vocab_size)
    return write_corpus(folder, documents, tokenizer=tokenizer, shard_tokens=shard_tokens)


def open_numbers(folder: Path, lengths: Sequence[int], shard_tokens: int = 64) -> Corpus:
    write_numbers(folder, lengths, shard_tokens)
    return Corpus.open(folder)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder` with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
