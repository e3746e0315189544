import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data import sources
from data.inputs import documents, find_inputs
from data.stdlib import stdlib_documents

TEXTS = ["first\ndocument", "second: naïve 中文", "third"]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: t}) + "\n" for i, t in enumerate(texts)).encode()


def parquet(path: Path, texts: list[str | None], key: str = "text", group: int = 2) -> None:
    pq.write_table(pa.table({key: texts, "id": list(range(len(texts)))}), path, group)


def texts_of(*inputs: Path | str, text_key: str = "text") -> list[str]:
    return [document.text for document in documents(inputs, text_key=text_key)]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.rst", "README"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(PACKERS[suffix](TEXTS[1].encode()))
    assert texts_of(path) == [TEXTS[1]]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSONL"])
def test_every_line_of_jsonl_is_a_document(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(PACKERS[suffix](jsonl(TEXTS)))
    assert texts_of(path) == TEXTS


def test_the_key_of_the_text_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, "body"))
    parquet(tmp_path / "b.parquet", [*TEXTS], "body")
    assert texts_of(tmp_path, text_key="body") == TEXTS * 2


def test_blank_lines_of_jsonl_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" + jsonl(TEXTS) + b"  \n\n")
    assert texts_of(tmp_path / "a.jsonl") == TEXTS


def test_a_last_line_without_line_break_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS).rstrip(b"\n"))
    assert texts_of(tmp_path / "a.jsonl") == TEXTS


@pytest.mark.parametrize("group", [1, 2, 100])
def test_every_row_of_parquet_is_a_document(tmp_path: Path, group: int) -> None:
    parquet(tmp_path / "a.parquet", [*TEXTS], group=group)
    assert texts_of(tmp_path / "a.parquet") == TEXTS


def test_a_null_of_parquet_is_an_empty_text(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", ["x", None, "y"])
    assert texts_of(tmp_path / "a.parquet") == ["x", "", "y"]


def test_zstd_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    skipped = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"  # as pzstd writes them
    path.write_bytes(b"".join(skipped + zstandard.compress(jsonl([text])) for text in TEXTS))
    assert texts_of(path) == TEXTS
    path.write_bytes(zstandard.compress(jsonl(TEXTS * 30_000)))
    assert texts_of(path) == TEXTS * 30_000


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("x".encode("utf-8-sig"))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["y"]))
    assert texts_of(tmp_path) == ["x", "y"]


def test_line_breaks_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert texts_of(tmp_path / "a.txt") == ["a\r\nb\rc\n"]


def test_folders_are_read_recursively_in_alphabetical_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.md", "a/deep/er/x.txt", "c.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts_of(tmp_path) == ["c.py", "a/deep/er/x.txt", "b/1.md", "b/2.txt"]


def test_hidden_files_and_caches_are_passed_over(tmp_path: Path) -> None:
    for name in (".git/config", ".hidden.txt", "__pycache__/x.py", "seen.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts_of(tmp_path) == ["seen.txt"]


def test_files_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0\0")
    assert find_inputs([tmp_path]).ignored == (str(tmp_path / "b.png"),)
    assert texts_of(tmp_path) == ["text"]


def test_inputs_keep_the_order_they_were_given_in(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    assert texts_of(*(tmp_path / name for name in "bca")) == ["b", "c", "a"]


def test_small_blocks_hold_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [f"document {i} " * (i % 7) + "." for i in range(200)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(many))
    parquet(tmp_path / "b.parquet", [*many], group=30)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 300)
    blocks = list(find_inputs([tmp_path]).blocks("text"))
    assert len(blocks) > 20
    assert [d.text for _, block in blocks for d in block.documents()] == many * 2


def test_documents_are_named_by_line_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    parquet(tmp_path / "b.parquet", [*TEXTS])
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1)
    names = [document.name.rsplit("/")[-1] for document in documents([tmp_path])]
    assert names == [
        "a.jsonl:1",
        "a.jsonl:2",
        "a.jsonl:3",
        "b.parquet#0",
        "b.parquet#1",
        "b.parquet#2",
    ]


def test_the_sizes_of_the_blocks_add_up_to_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1000)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS * 50)))
    found = find_inputs([tmp_path, "stdlib"])
    assert sum(block.size for _, block in found.blocks("text")) == found.bytes


def test_the_stdlib_has_many_long_documents() -> None:
    sizes = [len(text) for text in texts_of("stdlib")]
    assert len(sizes) >= 50 and sum(size >= 32 << 10 for size in sizes) >= len(sizes) - 1


def test_the_stdlib_has_the_same_order_every_time() -> None:
    assert stdlib_documents() == stdlib_documents()


def test_the_stdlib_leaves_out_tests_and_fixtures() -> None:
    parts = {
        part
        for document in stdlib_documents()
        for path in document.paths
        for part in path.relative_to(document.root).parts[:-1]
    }
    assert not parts & {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}
    assert {"asyncio", "email", "mime"} <= parts


def test_the_modules_of_a_package_are_one_document_under_their_names() -> None:
    (document,) = [d for d in documents(["stdlib"]) if d.name == "stdlib:asyncio/__init__.py"]
    assert "\n# asyncio/tasks.py\n" in document.text


def broken_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(os.urandom(1000))[:-200])


def broken_zstd(path: Path) -> None:
    path.write_bytes(b"nothing of zstd")


def cut_zstd(path: Path) -> None:
    """A whole frame, and one whose last block and checksum are missing."""
    content = zstandard.compress(jsonl(TEXTS)), zstandard.compress(os.urandom(400_000))
    path.write_bytes(b"".join(content)[:-150_000])


def broken_parquet(path: Path) -> None:
    path.write_bytes(b"PAR1 nothing PAR1")


def broken_line(path: Path) -> None:
    path.write_bytes(jsonl(TEXTS) + b'{"text": "cut\n')


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.txt", written(b"caf\xe9"), r"a.txt: byte 3 \(0xe9\) is not UTF-8; convert"),
        ("a.txt", written("utf16".encode("utf-16")), "a.txt is not a text file"),
        ("a.txt.gz", broken_gzip, "a.txt.gz cannot be read"),
        ("a.jsonl.gz", written(b"not gzip"), "a.jsonl.gz cannot be read"),
        ("a.jsonl.zst", broken_zstd, "a.jsonl.zst cannot be read"),
        ("a.txt.zst", cut_zstd, "a.txt.zst cannot be read .*in the middle of a zstd frame"),
        ("a.jsonl", broken_line, "a.jsonl:4: not valid JSON .*mend or remove the line"),
        ("a.jsonl", written(b'{"a": 1}\n'), r"a.jsonl:1: no key 'text', it has \['a'\]; set"),
        ("a.jsonl", written(b"[1]\n"), "a.jsonl:1: no key 'text', it has list"),
        ("a.jsonl", written(b'{"text": 5}\n'), "a.jsonl:1: 'text' is int, not a string"),
        ("a.jsonl", written(b'{"text": "\xff"}\n'), "a.jsonl:1: byte 10 .* is not UTF-8"),
        ("a.jsonl", written(b'{"text": "\\ud800"}\n'), "a.jsonl:1: .* half a character"),
        ("a.parquet", broken_parquet, "a.parquet cannot be read as parquet"),
        ("a.parquet.gz", written(b""), "parquet is compressed inside; unpack"),
        ("a.parquet", lambda p: parquet(p, ["x"], "body"), "no column 'text', it has .*body"),
    ],
)
def test_broken_inputs_name_the_place_and_the_remedy(
    tmp_path: Path, name: str, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        texts_of(tmp_path / name)


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [*TEXTS])
    with pytest.raises(ValueError, match="column 'id' holds int64, not strings"):
        texts_of(tmp_path / "a.parquet", text_key="id")


def test_line_numbers_count_through_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"] * 40) + b"{broken\n")
    monkeypatch.setattr(sources, "BLOCK_BYTES", 64)
    with pytest.raises(ValueError, match="a.jsonl:41: not valid JSON"):
        texts_of(tmp_path / "a.jsonl")


def test_an_input_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        find_inputs([tmp_path / "nowhere"])


def test_no_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no input: name at least one"):
        find_inputs([])


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"holds no text \(1 other files\)"):
        find_inputs([tmp_path])


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="would be trained on twice"):
        find_inputs([tmp_path, tmp_path / "a.txt"])
