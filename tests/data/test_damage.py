import os
import shutil
from pathlib import Path

import pytest

from data.index import Corpus
from data.loader import load
from data.streams import IGNORE, Streams
from data.tokenizer import ByteTokenizer
from tests.data.corpora import write_numbers

LENGTHS = [20, 30, 25, 40, 50, 10]  # three shards of two documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    manifest = write_numbers(tmp_path / "train", LENGTHS, shard_tokens=70)
    assert [shard.documents for shard in manifest.shards] == [2, 2, 2]
    return tmp_path / "train"


def flip_bit(folder: Path, shard: int, document: int) -> None:
    path = folder / f"shard-{shard:06d}.tar"
    content = bytearray(path.read_bytes())
    position = content.index(f"{shard:06d}-{document:08d}".encode()) + 512 + 6
    content[position] ^= 4
    path.write_bytes(content)


def cut_behind_first_member(folder: Path, shard: int) -> None:
    path = folder / f"shard-{shard:06d}.tar"
    os.truncate(path, path.read_bytes().index(f"{shard:06d}-00000001".encode()))


def swap(a: Path, b: Path) -> None:
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)


def test_a_flipped_bit_stops_the_run(folder: Path) -> None:
    flip_bit(folder, 1, 0)
    corpus = Corpus.open(folder)
    with pytest.raises(ValueError, match=r"shard-000001.tar: document 0 \(25 tokens\) has crc32"):
        corpus.read(2, 0, 3)


def test_a_flipped_bit_stops_the_run_every_time_it_is_read(folder: Path) -> None:
    flip_bit(folder, 1, 0)
    corpus = Corpus.open(folder)
    for _ in range(2):
        with pytest.raises(ValueError, match="has crc32"):
            corpus.read(2, 0, 3)


def test_a_flipped_bit_reaches_the_training_loop(folder: Path) -> None:
    flip_bit(folder, 1, 0)
    corpus = Corpus.open(folder)
    streams = Streams(corpus.lengths, seed=0, lanes=1, segment_len=8, segments=100)
    with pytest.raises(ValueError, match="data.on_damage=skip"):
        list(load(corpus, streams, position=0, dp_rank=0, dp_size=1, micro_batch=1, steps=1))


def test_the_neighbours_of_a_flipped_bit_are_read(folder: Path) -> None:
    flip_bit(folder, 1, 0)
    corpus = Corpus.open(folder)
    assert [len(corpus.read(d, 0, LENGTHS[d])) for d in (1, 3)] == [30, 40]


def test_a_shard_cut_between_two_members_stops_the_run(folder: Path) -> None:
    cut_behind_first_member(folder, 0)
    with pytest.raises(ValueError, match="shard-000000.tar has .* bytes, the manifest says"):
        Corpus.open(folder)


def test_a_shard_cut_while_it_is_open_stops_the_run(folder: Path) -> None:
    corpus = Corpus.open(folder)
    cut_behind_first_member(folder, 0)
    with pytest.raises(ValueError, match="document 1 .* cannot be read: the file ends early"):
        corpus.read(1, 0, 3)


def test_a_missing_shard_stops_the_run(folder: Path) -> None:
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(ValueError, match="shard-000002.tar is missing"):
        Corpus.open(folder)


def test_a_missing_index_stops_the_run(folder: Path) -> None:
    (folder / "shard-000002.tar.idx.npy").unlink()
    with pytest.raises(ValueError, match="shard-000002.tar.idx.npy is missing"):
        Corpus.open(folder)


def test_the_index_of_another_shard_stops_the_run(folder: Path) -> None:
    swap(folder / "shard-000000.tar.idx.npy", folder / "shard-000001.tar.idx.npy")
    with pytest.raises(ValueError, match="is not the index of this shard.*and 1 more"):
        Corpus.open(folder)


def test_the_manifest_of_another_corpus_stops_the_run(folder: Path, tmp_path: Path) -> None:
    write_numbers(tmp_path / "other", [20, 30, 25, 41, 50, 10], shard_tokens=70)
    shutil.copy(tmp_path / "other" / "manifest.json", folder)
    with pytest.raises(ValueError, match="the manifest says|is not the index"):
        Corpus.open(folder)


def test_a_shard_of_another_corpus_with_the_same_size_stops_the_run(
    folder: Path, tmp_path: Path
) -> None:
    # Same shapes, other tokens: only the crc32 tells them apart.
    write_numbers(tmp_path / "other", [21, 30, 25, 40, 50, 10], shard_tokens=71)
    shutil.copy(tmp_path / "other" / "shard-000001.tar", folder)
    corpus = Corpus.open(folder)
    with pytest.raises(ValueError, match="shard-000001.tar: document 0 .* has crc32"):
        corpus.read(2, 0, 1)


def test_a_shard_that_the_manifest_does_not_list_stops_the_run(folder: Path) -> None:
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000007.tar")
    with pytest.raises(ValueError, match="shard-000007.tar is not in the manifest"):
        Corpus.open(folder)


def test_another_tokenizer_beside_the_shards_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(ByteTokenizer().to_json())
    with pytest.raises(ValueError, match=r"was written with tokenizer numbers-1048576 .*not with"):
        Corpus.open(folder).tokenizer()


def test_an_unknown_mode_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="on_damage='ignore' is neither"):
        Corpus.open(folder, on_damage="ignore")  # type: ignore[arg-type]


def read_epoch(corpus: Corpus) -> list[int]:
    """Return all targets of one epoch, in order."""
    streams = Streams(corpus.lengths, seed=3, lanes=2, segment_len=8, segments=2)
    steps = load(
        corpus,
        streams,
        position=0,
        dp_rank=0,
        dp_size=1,
        micro_batch=1,
        workers=2,
        steps=streams.steps_per_epoch,
    )
    labels = [batch.labels.flatten().tolist() for batches in steps for batch in batches]
    return [label for row in labels for label in row]


def targets_without(labels: list[int], lost: set[int]) -> list[int]:
    return [IGNORE if label in lost else label for label in labels]


def test_a_healthy_corpus_names_no_damage(folder: Path) -> None:
    corpus = Corpus.open(folder, on_damage="skip")
    read_epoch(corpus)
    assert corpus.damage == ()


def test_a_skipped_document_is_named_once(folder: Path) -> None:
    flip_bit(folder, 1, 0)
    corpus = Corpus.open(folder, on_damage="skip")
    read_epoch(corpus)
    read_epoch(corpus)
    assert len(corpus.damage) == 1 and "shard-000001.tar: document 0" in corpus.damage[0]


def count(labels: list[int]) -> int:
    return sum(label != IGNORE for label in labels)


def test_a_skipped_document_leaves_a_hole_and_moves_nothing(folder: Path) -> None:
    whole = read_epoch(Corpus.open(folder))
    lost = set(Corpus.open(folder).read(2, 0, 24).tolist())
    flip_bit(folder, 1, 0)
    got = read_epoch(Corpus.open(folder, on_damage="skip"))
    # The lost document's closing token is a 0 like every other one: it is counted apart.
    expected = targets_without(whole, lost)
    different = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]
    assert count(got) == sum(LENGTHS) - 6 - 24
    assert [(expected[i], got[i]) for i in different] == [(0, IGNORE)]


@pytest.mark.parametrize("kind", ["missing", "cut"])
def test_a_skipped_shard_is_named_and_its_documents_are_holes(folder: Path, kind: str) -> None:
    if kind == "missing":
        (folder / "shard-000001.tar").unlink()
    else:
        cut_behind_first_member(folder, 1)
    corpus = Corpus.open(folder, on_damage="skip")
    assert count(read_epoch(corpus)) == sum(LENGTHS) - 6 - 24 - 39
    assert len(corpus.damage) == 1 and "shard-000001.tar" in corpus.damage[0]


def test_skipping_a_shard_does_not_change_the_fingerprint(folder: Path) -> None:
    whole = Corpus.open(folder).fingerprint
    (folder / "shard-000001.tar").unlink()
    assert Corpus.open(folder, on_damage="skip").fingerprint == whole


def test_a_lost_index_changes_the_fingerprint_because_it_changes_the_order(
    folder: Path,
) -> None:
    whole = Corpus.open(folder).fingerprint
    (folder / "shard-000001.tar.idx.npy").unlink()
    corpus = Corpus.open(folder, on_damage="skip")
    assert len(corpus.lengths) == 4 and "idx.npy is missing" in corpus.damage[0]
    assert corpus.fingerprint != whole


def test_all_shards_lost_is_an_error_even_when_skipping(folder: Path) -> None:
    for path in folder.glob("*.idx.npy"):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no readable document \(6 listed\)"):
        Corpus.open(folder, on_damage="skip")


def test_what_was_verified_is_what_is_read(folder: Path) -> None:
    """The bytes whose crc32 was right: not read a second time, between which they may change."""
    expected = Corpus.open(folder).read(2, 0, 25).tolist()
    corpus = Corpus.open(folder)
    assert corpus.intact(2)
    flip_bit(folder, 1, 0)
    assert corpus.read(2, 0, 25).tolist() == expected
    assert corpus.read(2, 1, 20).tolist() == expected[1:20]
    assert corpus.read(3, 0, 40).tolist() == Corpus.open(folder).read(3, 0, 40).tolist()
    assert corpus.read(2, 0, 25).tolist() != expected  # another document was held meanwhile
