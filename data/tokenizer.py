"""Text to token ids and back: bytes, a tokenizers JSON file, or one trained here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data.shards import TokenArray, Vocabulary, token_dtype

END_OF_DOCUMENT = "<|end_of_document|>"
# What published tokenizers call it; the first one that a vocabulary has is taken.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# `tokenizers` keeps about 100 bytes a token while it encodes: longer texts go in pieces.
_PIECE_CHARACTERS = 4 << 20


class Tokenizer(Vocabulary, Protocol):
    """What prepare, evaluation and generation need of a tokenizer."""

    def encode(self, text: str) -> TokenArray:
        """Return the ids of `text`, in the stored dtype, without end_of_document."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; end_of_document stands for nothing."""


@dataclass(frozen=True)
class TokenizerTraining:
    """A tokenizer still to be trained, on a sample of the texts that are prepared."""

    vocab_size: int = 32000
    sample_bytes: int = 100 << 20


class ByteTokenizer:
    """UTF-8 bytes 0..255 and end_of_document 256: nothing to train, nothing to download."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256

    @cached_property
    def sha256(self) -> str:
        """The hash of `to_json()`."""
        return _sha256(self.to_json())

    def encode(self, text: str) -> TokenArray:
        """Return the UTF-8 bytes of `text` as uint16."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype("<u2")

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of these bytes; cut characters become U+FFFD."""
        kept = bytes(i for i in _plain(ids) if i != self.end_of_document)
        return kept.decode(errors="replace")

    def to_json(self) -> str:
        """Return the same tokenizer for the `tokenizers` library, ids equal to bytes."""
        vocab = {character: byte for byte, character in enumerate(_byte_characters())}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        model: dict[str, Any] = {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix")),
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        }
        end = {"id": 256, "content": END_OF_DOCUMENT, "special": True, "normalized": False}
        end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        parts = {
            "version": "1.0",
            **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
            "added_tokens": [end],
            "pre_tokenizer": {**level, "use_regex": False},
            "decoder": {**level, "use_regex": False},
            "model": model,
        }
        return json.dumps(parts, indent=1) + "\n"


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, from the text of its JSON file.

    What would quietly damage a corpus is taken out: truncation, padding, and special tokens
    spelled out inside a text (they are encoded as ordinary text). If the vocabulary has no
    known end-of-document token, one is added.
    """

    def __init__(self, text: str, where: str = "this text") -> None:
        import tokenizers  # 0.1 s: the byte tokenizer needs nothing of it

        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{where} is not a tokenizer of the `tokenizers` library ({error}); pass its"
                f" tokenizer.json, or train one with `longhaul prepare --train-tokenizer`"
            ) from error
        vocab = self._inner.get_vocab(with_added_tokens=True)
        ends = [token for token in _KNOWN_ENDS if token in vocab]
        if not ends or self._inner.truncation or self._inner.padding:
            self._inner.no_truncation()
            self._inner.no_padding()
            if not ends:
                self._inner.add_special_tokens([END_OF_DOCUMENT])
                ends = [END_OF_DOCUMENT]
            text = self._inner.to_str(pretty=True)
            vocab = self._inner.get_vocab(with_added_tokens=True)
        self._inner.encode_special_tokens = True
        self._text = text
        self.sha256 = _sha256(text)
        # The largest id, not the count: a vocabulary may have gaps.
        self.vocab_size = max(vocab.values()) + 1
        self.end_of_document = vocab[ends[0]]
        self.name = f"{json.loads(text)['model']['type'].lower()}-{self.vocab_size}"

    def encode(self, text: str) -> TokenArray:
        """Return the ids of `text`, uint16 where the vocabulary allows it, else uint32."""
        ids: list[int] = []
        for piece in _pieces(text, _PIECE_CHARACTERS):
            ids += self._inner.encode(piece, add_special_tokens=False).ids
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, end_of_document left out."""
        kept = [i for i in _plain(ids) if i != self.end_of_document]
        return str(self._inner.decode(kept, skip_special_tokens=False))

    def to_json(self) -> str:
        """Return the text of tokenizer.json, the one that `sha256` is taken of."""
        return self._text


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> JsonTokenizer:
    """Return a byte-level BPE of at most `vocab_size` ids, trained on `texts`.

    Every text is encoded without loss. A small sample gives a smaller vocabulary. About 0.5
    MB/s on one core; memory grows with the number of different words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: 256 bytes and the end-of-document token"
            f" need 257; use more, or the byte tokenizer"
        )
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return JsonTokenizer(inner.to_str(pretty=True))


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Return the tokenizer `source` names: "bytes", or the path of a tokenizer.json."""
    if source == ByteTokenizer.name:
        return ByteTokenizer()
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        raise ValueError(_unreadable(str(source), error)) from error
    return read_tokenizer(content, str(source))


def read_tokenizer(content: bytes, where: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json's bytes; ValueError, naming `where`, for others."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(_unreadable(where, error)) from error
    bytes_tokenizer = ByteTokenizer()
    if text == bytes_tokenizer.to_json():
        return bytes_tokenizer
    return JsonTokenizer(text, where)


def _unreadable(where: str, error: Exception) -> str:
    return (
        f"tokenizer {where!r} cannot be read ({error}); use 'bytes' or the path of a tokenizer.json"
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(ids: Iterable[int]) -> list[int]:
    listed: NDArray[np.int64] = np.asarray(ids if hasattr(ids, "__len__") else list(ids))
    return [int(i) for i in listed]


def _pieces(text: str, limit: int) -> Iterator[str]:
    # Cut behind a line break, where byte-level pre-tokenizers cut as well, but for runs of
    # blank lines: there a token or two may differ from one single call, the text never does.
    start = 0
    while len(text) - start > limit:
        cut = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def _byte_characters() -> list[str]:
    # The printable stand-ins that the library's ByteLevel uses: Latin-1's visible characters
    # for themselves, the other 68 bytes in their order from U+0100 on.
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    moved = {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]
