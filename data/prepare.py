"""`longhaul prepare`: texts to shards, on all cores, interrupted and continued at will.

The parent lists blocks of input in a fixed order and keeps the workers busy; a worker reads
the documents of a block, decides their side and tokenises them; the parent writes them in
order. So the shards are the same bytes for any number of workers and any number of kills.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.durable import write_atomically
from data.index import Corpus
from data.inputs import Inputs, find_inputs
from data.journal import SIDES, Cursor, Journal, Progress, claimed
from data.prepared import Prepared
from data.progress import Bar
from data.shards import (
    SHARD_TOKENS,
    TOKENIZER,
    Manifest,
    ShardSequence,
    token_dtype,
)
from data.split import Side, Split, choose_split
from data.tokenizer import Tokenizer, TokenizerTraining, load_tokenizer, train_tokenizer
from data.workers import Job, in_order

_SAMPLE_CHARACTERS = 64 << 10
_LEAST_SAMPLE_BYTES = 1 << 20


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: Tokenizer | TokenizerTraining,
    valid_fraction: float = 0.01,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    text_key: str = "text",
    seed: int = 0,
    progress: bool = True,
    force: bool = False,
) -> Prepared:
    """Write `inputs` as shards under output/train and output/valid; return what was written.

    inputs: files, folders, or the word "stdlib". tokenizer: one to use, or the wish to train
    one on the training documents. valid_fraction: share of the documents held out, by a hash
    of their text and `seed`. workers: processes (None: all cores; 1: this process alone).
    text_key: key or column of the text in JSONL and parquet. A killed prepare continues where
    its last shard ended; a finished one with the same inputs and settings is left as it is;
    force writes it anew.

    Raises ValueError for everything that the user can mend.
    """
    workers = _check(valid_fraction, shard_tokens, workers, seed, tokenizer)
    found = find_inputs(inputs)
    out = Path(output).absolute()
    for source in found.sources:
        if source.name == str(source.root) and out.is_relative_to(source.root):
            raise ValueError(f"output {out} lies inside the input {source.root}; move it out")
    settings = {
        "inputs": {"files": found.files, "bytes": found.bytes, "sha256": found.sha256},
        "tokenizer": _tokenizer_settings(tokenizer),
        "valid_fraction": valid_fraction,
        "shard_tokens": shard_tokens,
        "text_key": text_key,
        "seed": seed,
    }
    with claimed(out):
        journal = Journal(out, settings)
        if force:
            journal.clear()
        summary = None if force else journal.finished()
        if summary is None:
            journal.begin()
            run = _Run(found, journal, text_key, shard_tokens, workers)
            with Bar(found.bytes, shown=progress) as bar:
                summary = run.write(tokenizer, seed, valid_fraction, bar)
            return _result(out, summary, tokenizer, reused=False)
        try:
            return _result(out, summary, tokenizer, reused=True)
        except ValueError as error:
            raise ValueError(
                f"{out} was finished and is damaged now: {error}; to prepare it again, add --force"
            ) from error


class _Run:
    """One prepare under way."""

    def __init__(
        self, found: Inputs, journal: Journal, text_key: str, shard_tokens: int, workers: int
    ) -> None:
        self._found = found
        self._journal = journal
        self._text_key = text_key
        self._shard_tokens = shard_tokens
        self._workers = workers

    def write(
        self,
        tokenizer: Tokenizer | TokenizerTraining,
        seed: int,
        valid_fraction: float,
        bar: Bar,
    ) -> dict[str, Any]:
        """Write all shards and manifests; return the summary that prepare.json keeps."""
        split = choose_split(self._texts(), seed=seed, valid_fraction=valid_fraction)
        made = self._tokenizer(tokenizer, split, bar)
        before = self._journal.read(token_dtype(made.vocab_size))
        sides = SIDES if valid_fraction else SIDES[:1]
        sequences = {
            side: ShardSequence(
                self._journal.output / side,
                made.vocab_size,
                self._shard_tokens,
                before[side].shards,
            )
            for side in sides
        }
        try:
            empty = self._write_shards(sequences, before, made, split, bar)
        finally:
            for sequence in sequences.values():
                sequence.abandon()
        for side in sides:
            folder = self._journal.output / side
            write_atomically(folder / TOKENIZER, made.to_json().encode())
            Manifest.of(made, sequences[side].finished).write(folder)
        summary = {
            "sources": [source.name for source in self._found.sources],
            "input_bytes": self._found.bytes,
            "empty_documents": empty,
            "ignored": self._found.ignored,
            "sides": sides,
        }
        self._journal.finish(summary)
        return summary

    def _write_shards(
        self,
        sequences: Mapping[Side, ShardSequence],
        before: Mapping[Side, Progress],
        tokenizer: Tokenizer,
        split: Split,
        bar: Bar,
    ) -> int:
        cursors = {side: before[side].cursor for side in sequences}
        empty = min((before[side].cursor, before[side].empty) for side in sequences)[1]
        documents = [0] * len(self._found.sources)
        jobs = self._jobs(cursors, documents, bar)
        source = end = 0
        for job, result in in_order(
            jobs, self._journal.tokenizer_path, tokenizer.sha256, split, self._workers
        ):
            while source < job.source:
                self._require_documents(source, documents)
                source += 1
            for index, side, tokens in result.documents:
                closed = sequences[side].add(tokens)
                if closed:
                    self._journal.record(side, closed, (job.number, index), empty)
            documents[job.source] += result.found - result.empty
            empty += result.empty
            end = job.number + 1
            bar.update(job.block.size)
        while source < len(documents):
            self._require_documents(source, documents)
            source += 1
        for side, sequence in sequences.items():
            closed = sequence.close()
            if closed:
                self._journal.record(side, closed, (end, 0), empty)
        return empty

    def _jobs(
        self, cursors: Mapping[Side, Cursor], documents: list[int], bar: Bar
    ) -> Iterator[Job]:
        for number, (source, block) in enumerate(self._found.blocks(self._text_key)):
            if all(number < cursor[0] for cursor in cursors.values()):
                # In finished shards already, so this input did give documents.
                documents[source] += 1
                bar.update(block.size)
                continue
            done = {side: _done(number, cursor) for side, cursor in cursors.items()}
            yield Job(number, source, block, done)

    def _require_documents(self, source: int, documents: Sequence[int]) -> None:
        if documents[source] == 0:
            raise ValueError(
                f"input {self._found.sources[source].name} is empty: it holds no document with"
                f" text; leave it out"
            )

    def _texts(self) -> Iterator[str]:
        for _, block in self._found.blocks(self._text_key):
            for document in block.documents():
                yield document.text

    def _tokenizer(
        self, wanted: Tokenizer | TokenizerTraining, split: Split, bar: Bar
    ) -> Tokenizer:
        path = self._journal.tokenizer_path
        if isinstance(wanted, TokenizerTraining):
            if path.is_file():
                return load_tokenizer(path)
            bar.say(f"training a tokenizer of {wanted.vocab_size} ids")
            sample = self._sample(split, wanted.sample_bytes)
            wanted = train_tokenizer(sample, vocab_size=wanted.vocab_size)
        write_atomically(path, wanted.to_json().encode())
        return wanted

    def _sample(self, split: Split, sample_bytes: int) -> Iterator[str]:
        # Pieces from everywhere, by hash: the first sample_bytes would be the first input's.
        share = sample_bytes / max(1, self._found.bytes)
        left = sample_bytes
        for text in self._texts():
            identity = split.identity(text)
            if split.side(identity) == "valid":
                continue
            for start in range(0, len(text), _SAMPLE_CHARACTERS):
                drawn = hashlib.blake2b(identity + start.to_bytes(8, "little"), digest_size=8)
                if int.from_bytes(drawn.digest(), "little") < share * 2**64:
                    piece = text[start : start + _SAMPLE_CHARACTERS]
                    yield piece
                    left -= len(piece.encode())
                    if left <= 0:
                        return


def _done(number: int, cursor: Cursor) -> int:
    if number == cursor[0]:
        return cursor[1]
    return 0 if number > cursor[0] else 1 << 62


def _check(
    valid_fraction: float,
    shard_tokens: int,
    workers: int | None,
    seed: int,
    tokenizer: Tokenizer | TokenizerTraining,
) -> int:
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction={valid_fraction} is not in [0, 1); use 0.01")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1; use {SHARD_TOKENS}")
    if not 0 <= seed < 1 << 128:
        raise ValueError(f"seed={seed} must not be negative")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1; leave it out for all cores")
    if isinstance(tokenizer, TokenizerTraining):
        if tokenizer.sample_bytes < _LEAST_SAMPLE_BYTES:
            raise ValueError(
                f"sample_bytes={tokenizer.sample_bytes} is too small a sample; use"
                f" {_LEAST_SAMPLE_BYTES} or more"
            )
    return workers or len(os.sched_getaffinity(0))


def _tokenizer_settings(tokenizer: Tokenizer | TokenizerTraining) -> dict[str, Any]:
    if isinstance(tokenizer, TokenizerTraining):
        return {"trained": asdict(tokenizer)}
    return {"name": tokenizer.name, "sha256": tokenizer.sha256}


def _result(
    output: Path,
    summary: Mapping[str, Any],
    tokenizer: Tokenizer | TokenizerTraining,
    *,
    reused: bool,
) -> Prepared:
    # Opened, not only read: this is the last chance to notice a shard that went missing.
    manifests = {side: Corpus.open(output / side).manifest for side in summary["sides"]}
    return Prepared(
        output=output,
        train=manifests["train"],
        valid=manifests.get("valid"),
        input_bytes=summary["input_bytes"],
        empty_documents=summary["empty_documents"],
        ignored=tuple(summary["ignored"]),
        reused=reused,
        wanted_vocab=tokenizer.vocab_size if isinstance(tokenizer, TokenizerTraining) else None,
    )
