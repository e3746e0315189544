"""What a prepare wrote, and what it says of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.shards import Manifest
from data.wording import counted

_HELD_OUT = 8
"""Documents to hold out of a small corpus: enough for each to be read with another's memory."""


@dataclass(frozen=True)
class Prepared:
    """What a prepare wrote, or found finished (`reused`)."""

    output: Path
    train: Manifest
    valid: Manifest | None
    input_bytes: int
    empty_documents: int
    ignored: tuple[str, ...]
    reused: bool
    wanted_vocab: int | None = None  # ids of a tokenizer that was to be trained

    def lines(self) -> Iterator[str]:
        """Yield what was written and what was left out."""
        if self.reused:
            yield f"{self.output} holds just this already; --force writes it anew"
        for side, manifest in (("train", self.train), ("valid", self.valid)):
            if manifest is not None:
                yield (
                    f"{self.output / side}: {counted(manifest.documents, 'document')},"
                    f" {counted(manifest.tokens, 'token')},"
                    f" {counted(len(manifest.shards), 'shard')}"
                )
        if self.empty_documents:
            yield f"left out as empty: {counted(self.empty_documents, 'document')}"
        if self.ignored:
            yield (
                f"left out as no text: {counted(len(self.ignored), 'file')},"
                f" such as {self.ignored[0]}"
            )

    def warnings(self) -> Iterator[str]:
        """Yield what a user may not expect, with what to do."""
        if self.valid is not None and self.valid.documents < 2:
            yield (
                f"{self.output / 'valid'} holds {counted(self.valid.documents, 'document')}: to"
                f" measure whether a memory is used takes another document's memory, so 2 or more;"
                f" {self._more_held_out(self.valid.documents)}"
            )
        if self.wanted_vocab is not None and self.train.vocab_size < self.wanted_vocab:
            yield (
                f"the tokenizer has {self.train.vocab_size:,} ids, not the {self.wanted_vocab:,} of"
                f" --train-tokenizer: the texts hold no more pairs to join; give it more text, or"
                f" take it as it is"
            )

    def _more_held_out(self, valid: int) -> str:
        documents = self.train.documents + valid
        if documents < 2 * 2:
            return "add documents, or set --valid-fraction 0"
        fraction = min(0.5, math.ceil(100 * _HELD_OUT / documents) / 100)
        return f"prepare it again with --valid-fraction {fraction:g} --force, or add documents"
