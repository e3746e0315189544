"""What prepare says of what it wrote."""

from pathlib import Path

import pytest

from data.inputs import find_inputs
from data.prepared import Prepared
from data.shards import Manifest
from data.tokenizer import TokenizerTraining
from tests.data.corpora import write_numbers
from tests.data.test_prepare import run, story


def made(folder: Path, train: int, valid: int, **changes: object) -> Prepared:
    """Return what a prepare of so many documents gives, in one shard a side."""

    def side(name: str, documents: int) -> Manifest:
        return write_numbers(folder / name, [5] * documents, shard_tokens=1000)

    values: dict[str, object] = {
        "output": folder,
        "train": side("train", train),
        "valid": side("valid", valid) if valid else None,
        "input_bytes": 1,
        "empty_documents": 0,
        "ignored": (),
        "reused": False,
        **changes,
    }
    return Prepared(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("train", "remedy"),
    [
        (79, "again with --valid-fraction 0.1 --force"),
        (999, "again with --valid-fraction 0.01 --force"),
        (3, "again with --valid-fraction 0.5 --force"),
        (1, "add documents, or set --valid-fraction 0"),
    ],
)
def test_one_held_out_document_is_warned_of_with_what_to_do(
    tmp_path: Path, train: int, remedy: str
) -> None:
    (text,) = made(tmp_path, train, 1).warnings()
    assert "valid holds 1 document: to measure whether a memory is used" in text and remedy in text


@pytest.mark.parametrize("valid", [0, 2])
def test_no_or_several_held_out_documents_are_not_warned_of(tmp_path: Path, valid: int) -> None:
    assert not list(made(tmp_path, 10, valid).warnings())


def test_one_of_a_thing_is_said_in_the_singular(tmp_path: Path) -> None:
    lines = list(made(tmp_path, 2, 1, empty_documents=1, ignored=("a.png",)).lines())
    assert lines[0] == f"{tmp_path / 'train'}: 2 documents, 10 tokens, 1 shard"
    assert lines[1] == f"{tmp_path / 'valid'}: 1 document, 5 tokens, 1 shard"
    assert lines[2:] == [
        "left out as empty: 1 document",
        "left out as no text: 1 file, such as a.png",
    ]


def test_a_tokenizer_of_fewer_ids_than_asked_for_is_told(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(story(number, 5))
    done = run(
        sorted(tmp_path.glob("*.txt")),
        tmp_path / "out",
        tokenizer=TokenizerTraining(600),
        valid_fraction=0,
    )
    (text,) = done.warnings()
    assert f"has {done.train.vocab_size} ids, not the 600 of --train-tokenizer" in text


@pytest.mark.parametrize("url", ["s3://bucket/books", "https://user:secret@host/books.jsonl?key=1"])
def test_prepare_says_that_it_reads_local_files(url: str) -> None:
    with pytest.raises(ValueError, match="is a URL, and prepare reads local files") as caught:
        find_inputs([url])
    assert "secret" not in str(caught.value) and "key=1" not in str(caught.value)
