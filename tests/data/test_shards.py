import json
import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data.index import Corpus
from data.shards import Manifest, ShardWriter, write_corpus
from tests.data.corpora import Numbers, open_numbers, snapshot, write_numbers

LENGTHS = [9, 1, 30, 64, 100, 2, 5]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_webdataset_reads_the_same_tokens(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    write_numbers(tmp_path, LENGTHS, vocab_size=vocab_size)
    corpus = Corpus.open(tmp_path)
    shards = [str(tmp_path / shard.name) for shard in corpus.manifest.shards]
    samples = wds.WebDataset(shards, shardshuffle=False, empty_check=False)
    read = [np.frombuffer(s["tokens.bin"], dtype=dtype).tolist() for s in samples]
    assert read == [corpus.read(d, 0, n).tolist() for d, n in enumerate(LENGTHS)]


def test_reading_a_part_gives_that_part(tmp_path: Path) -> None:
    corpus = open_numbers(tmp_path, LENGTHS)
    assert corpus.read(3, 5, 11).tolist() == corpus.read(3, 0, 64).tolist()[5:11]


def test_lengths_count_the_closing_token(tmp_path: Path) -> None:
    corpus = open_numbers(tmp_path, LENGTHS)
    assert corpus.lengths.tolist() == LENGTHS
    assert [int(corpus.read(d, n - 1, n)[0]) for d, n in enumerate(LENGTHS)] == [0] * 7


def test_shards_hold_at_most_shard_tokens_but_for_one_long_document(tmp_path: Path) -> None:
    manifest = write_numbers(tmp_path, LENGTHS, shard_tokens=64)
    assert [shard.tokens for shard in manifest.shards] == [40, 64, 100, 7]


def test_the_manifest_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    for shard in write_numbers(tmp_path, LENGTHS).shards:
        content = (tmp_path / shard.name).read_bytes()
        index = (tmp_path / f"{shard.name}.idx.npy").read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), sha256(content).hexdigest())
        assert shard.index_sha256 == sha256(index).hexdigest()


def test_the_manifest_survives_writing_and_reading(tmp_path: Path) -> None:
    assert write_numbers(tmp_path, LENGTHS) == Manifest.read(tmp_path)


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_numbers(tmp_path / name, LENGTHS)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_an_open_shard_has_no_final_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, 100)
    writer.add(np.arange(5))
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar.tmp"]
    writer.abandon()


@pytest.mark.parametrize("bad", [-1, 100])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, bad: int) -> None:
    with pytest.raises(ValueError, match=f"token id {bad} is outside vocab_size=100"):
        write_corpus(tmp_path, [np.array([5, bad])], tokenizer=Numbers(100))


def test_an_empty_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a document of 0 tokens"):
        ShardWriter(tmp_path, 0, 100).add(np.array([], dtype=np.int64))


def test_shards_are_not_written_into_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        write_numbers(tmp_path, LENGTHS)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="manifest.json does not exist.*longhaul prepare"):
        Corpus.open(tmp_path)


def test_the_folder_above_the_shards_is_refused_with_the_right_one(tmp_path: Path) -> None:
    write_numbers(tmp_path / "train", LENGTHS)
    with pytest.raises(ValueError, match="train holds shards; name that folder"):
        Corpus.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"tokens": 5},
        {"documents": 999},
        {"dtype": "<u2"},
        {"vocab_size": "many"},
        {"surprise": 1},
        {"shards": [{"name": "x"}]},
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write_numbers(tmp_path, LENGTHS)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="is not a manifest of longhaul shards"):
        Corpus.open(tmp_path)


@pytest.mark.parametrize("name", ["../a/shard-000000.tar", "shard-000001.tar"])
def test_shards_elsewhere_or_listed_twice_are_refused(tmp_path: Path, name: str) -> None:
    write_numbers(tmp_path, LENGTHS)
    path = tmp_path / "manifest.json"
    fields = json.loads(path.read_text())
    fields["shards"][0]["name"] = name
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="its shards are not different files of this folder"):
        Corpus.open(tmp_path)


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    write_numbers(tmp_path, [])
    with pytest.raises(ValueError, match="holds no readable document"):
        Corpus.open(tmp_path)


def test_fingerprints_differ_with_the_content(tmp_path: Path) -> None:
    first = open_numbers(tmp_path / "a", [4, 5]).fingerprint
    assert first == Corpus.open(tmp_path / "a").fingerprint
    assert first != open_numbers(tmp_path / "b", [5, 4]).fingerprint


def test_more_shards_than_open_files_can_be_read(tmp_path: Path) -> None:
    lengths = [3] * 200
    corpus = open_numbers(tmp_path, lengths, shard_tokens=3)
    assert len(corpus.manifest.shards) == 200
    read = [corpus.read(d, 0, 2).tolist() for d in range(200)]
    assert [t for d in read for t in d] == list(range(1, 401))
    assert len(os.listdir("/proc/self/fd")) < 190
