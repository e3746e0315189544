"""What batches are read from: documents by number, of one corpus or of several."""

from __future__ import annotations

from typing import Protocol

from data.shards import TokenArray
from data.tokenizer import Tokenizer


class Documents(Protocol):
    """Random access to documents; safe to read from several threads."""

    @property
    def documents(self) -> int:
        """How many documents there are."""

    @property
    def fingerprint(self) -> str:
        """What makes the order: other documents have another one."""

    @property
    def damage(self) -> tuple[str, ...]:
        """What was skipped so far, each entry naming its file."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def tokenizer_sha256(self) -> str:
        """The hash of the tokenizer that made the documents."""

    @property
    def end_of_document(self) -> int:
        """The id that closes every document."""

    def describe(self) -> str:
        """Return what there is, as JSON, for the run's records."""

    def length(self, document: int) -> int:
        """Return the tokens of a document."""

    def intact(self, document: int) -> bool:
        """Say whether a document can be read; ValueError where a damaged one is to stop."""

    def read_stored(self, document: int, start: int, stop: int) -> TokenArray:
        """Return tokens [start, stop) of a document as stored: read-only uint16 or uint32."""

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer kept beside the shards; ValueError if it is another one."""
