"""A prepare that failed before its first shard binds nobody to its settings."""

import json
import os
from pathlib import Path

import pytest

from data.index import Corpus
from data.prepare import prepare
from data.tokenizer import ByteTokenizer, TokenizerTraining
from tests.data.corpora import snapshot
from tests.data.test_prepare import STORIES, run


@pytest.fixture
def other_key(tmp_path: Path) -> Path:
    path = tmp_path / "otherkey.jsonl"
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in STORIES))
    return path


def test_what_failed_before_its_first_shard_is_begun_anew_with_other_settings(
    other_key: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="set --text-key"):
        run(other_key, tmp_path / "out")
    result = run(other_key, tmp_path / "out", text_key="content")
    assert result.train.documents + (result.valid.documents if result.valid else 0) == len(STORIES)
    run(other_key, tmp_path / "fresh", text_key="content")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


def test_a_tokenizer_of_other_settings_is_not_used(other_key: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="too small"):
        run(other_key, output, text_key="content", tokenizer=TokenizerTraining(100))
    run(other_key, output, text_key="content", tokenizer=TokenizerTraining(350))
    assert Corpus.open(output / "train").vocab_size == 350


def test_a_tokenizer_trained_before_a_failure_is_not_used_with_other_settings(
    other_key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare.__module__ + "._Run._write_shards", _die)
        with pytest.raises(KeyboardInterrupt):
            run(other_key, output, text_key="content", tokenizer=TokenizerTraining(300))
    assert (output / ".prepare/tokenizer.json").is_file()
    run(other_key, output, text_key="content", tokenizer=TokenizerTraining(350))
    assert Corpus.open(output / "train").vocab_size == 350


def _die(*_: object) -> None:
    raise KeyboardInterrupt


def test_settings_that_differ_are_told_as_a_user_writes_them(
    other_key: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    trained = {"text_key": "content", "tokenizer": TokenizerTraining(300)}
    run(other_key, output, shard_tokens=16 << 20, **trained)
    with pytest.raises(ValueError) as caught:
        run(other_key, output, shard_tokens=5 << 10, tokenizer=ByteTokenizer())
    for told in (
        "--shard-tokens 16M there, 5k now",
        "--text-key content there, text now",
        "--train-tokenizer 300 there, --tokenizer bytes now",
    ):
        assert told in str(caught.value)
    assert "{" not in str(caught.value)


def test_input_files_that_only_changed_their_times_are_told_apart(
    other_key: Path, tmp_path: Path
) -> None:
    run(other_key, tmp_path / "out", text_key="content")
    os.utime(other_key, (1, 1))
    with pytest.raises(ValueError, match="the same ones with other names or times"):
        run(other_key, tmp_path / "out", text_key="content")
