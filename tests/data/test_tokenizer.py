import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from data import tokenizer as module
from data.shards import Manifest
from data.tokenizer import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    JsonTokenizer,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\n" * 20,
    "naïve café 中文 😀 \0 end",
] * 3
text = st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.fixture(scope="module")
def trained() -> JsonTokenizer:
    return train_tokenizer(TEXTS, vocab_size=400)


def word_level(**vocab: int) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return inner


@given(text)
@settings(max_examples=200, deadline=None)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text)
@settings(max_examples=200, deadline=None)
def test_a_trained_tokenizer_round_trips_what_it_never_saw(text: str) -> None:
    # Trained here, not in a fixture: hypothesis and function fixtures do not mix.
    assert TRAINED.decode(TRAINED.encode(text)) == text


TRAINED = train_tokenizer(TEXTS, vocab_size=300)


@given(text)
@settings(max_examples=50, deadline=None)
def test_the_byte_tokenizers_json_means_the_same_to_the_tokenizers_library(text: str) -> None:
    inner = tokenizers.Tokenizer.from_str(ByteTokenizer().to_json())
    ids = ByteTokenizer().encode(text).tolist()
    assert inner.encode(text).ids == ids and inner.decode(ids) == text


def test_bytes_are_their_own_ids() -> None:
    assert ByteTokenizer().encode("aé").tolist() == [97, 0xC3, 0xA9]


def test_the_byte_vocabulary_is_257_with_the_end_last() -> None:
    assert (ByteTokenizer().vocab_size, ByteTokenizer().end_of_document) == (257, 256)


def test_cut_characters_decode_to_a_replacement() -> None:
    assert ByteTokenizer().decode([0xC3, 65]) == "�A"


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_the_end_of_document_decodes_to_nothing(kind: str, trained: JsonTokenizer) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else trained
    ids = [*tokenizer.encode("one").tolist(), tokenizer.end_of_document]
    assert tokenizer.decode(ids) == "one"


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_the_hash_is_that_of_the_saved_file(kind: str, trained: JsonTokenizer) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else trained
    assert tokenizer.sha256 == sha256(tokenizer.to_json().encode()).hexdigest()


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_a_saved_tokenizer_loads_as_the_same_one(
    kind: str, trained: JsonTokenizer, tmp_path: Path
) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else trained
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    loaded = load_tokenizer(path)
    assert (loaded.name, loaded.sha256, loaded.vocab_size, loaded.end_of_document) == (
        tokenizer.name,
        tokenizer.sha256,
        tokenizer.vocab_size,
        tokenizer.end_of_document,
    )


def test_training_twice_gives_the_same_tokenizer(trained: JsonTokenizer) -> None:
    assert train_tokenizer(TEXTS, vocab_size=400).sha256 == trained.sha256


def test_training_makes_fewer_tokens_than_bytes(trained: JsonTokenizer) -> None:
    assert len(trained.encode(TEXTS[0])) * 3 < len(TEXTS[0])


def test_an_end_of_document_token_is_added_where_there_is_none() -> None:
    tokenizer = JsonTokenizer(word_level(a=0, b=1, **{"[UNK]": 2}).to_str())
    assert (tokenizer.end_of_document, tokenizer.vocab_size) == (3, 4)


def test_a_known_end_of_document_token_is_used() -> None:
    tokenizer = JsonTokenizer(word_level(**{"[UNK]": 0, "<|endoftext|>": 1, "a": 2}).to_str())
    assert (tokenizer.end_of_document, tokenizer.vocab_size) == (1, 3)


def test_the_vocabulary_reaches_to_the_largest_id() -> None:
    tokenizer = JsonTokenizer(word_level(**{"[UNK]": 0, "</s>": 1, "a": 70000}).to_str())
    assert tokenizer.vocab_size == 70001
    assert tokenizer.encode("a").dtype == np.uint32


def test_a_special_token_spelled_out_in_a_text_does_not_end_the_document(
    trained: JsonTokenizer,
) -> None:
    ids = trained.encode(f"before {END_OF_DOCUMENT} after").tolist()
    assert trained.end_of_document not in ids
    assert trained.decode(ids) == f"before {END_OF_DOCUMENT} after"


def test_truncation_and_padding_of_the_file_are_taken_out() -> None:
    inner = word_level(**{"[UNK]": 0, "</s>": 1, "a": 2})
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    assert JsonTokenizer(inner.to_str()).encode("a a a a a a").tolist() == [2] * 6


def test_long_texts_are_encoded_in_pieces_without_loss(
    trained: JsonTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "".join(TEXTS) * 2
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 100)
    assert trained.decode(trained.encode(long)) == long


def test_texts_below_the_piece_length_are_encoded_at_once(trained: JsonTokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(trained.to_json())
    assert trained.encode(TEXTS[0]).tolist() == inner.encode(TEXTS[0]).ids


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=256 is too small.*need 257"):
        train_tokenizer(TEXTS, vocab_size=256)


@pytest.mark.parametrize("content", ["{}", "not json", json.dumps({"model": {"type": "X"}})])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a tokenizer of the `tokenizers` library"):
        load_tokenizer(path)


def test_a_tokenizer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="'byte' cannot be read.*use 'bytes' or the path"):
        load_tokenizer("byte")


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(trained: JsonTokenizer) -> None:
    manifest = Manifest.of(ByteTokenizer(), [])
    with pytest.raises(ValueError, match=r"tokenizer bytes .*257 ids\), not with bpe-"):
        manifest.require_tokenizer(trained, "shards")


def test_the_tokenizer_that_made_the_shards_is_accepted(trained: JsonTokenizer) -> None:
    manifest = Manifest.of(trained, [])
    assert manifest.require_tokenizer(JsonTokenizer(trained.to_json()), "shards") is None
