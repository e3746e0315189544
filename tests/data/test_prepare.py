import gzip
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import sources
from data.index import Corpus
from data.journal import claimed
from data.prepare import prepare
from data.prepared import Prepared
from data.split import choose_split
from data.tokenizer import ByteTokenizer, TokenizerTraining
from tests.data.corpora import snapshot

WORDS = "time past memory segment reads whole books one after the other".split()


def story(number: int, words: int = 60) -> str:
    return f"story {number}: " + " ".join(WORDS[(number * i) % 11] for i in range(words))


STORIES = [story(n) for n in range(60)]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """One folder with every kind of source: 60 different documents."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in STORIES[:40])
    (folder / "a.jsonl").write_text(lines[: len(lines) // 2].rsplit("\n", 1)[0] + "\n")
    rest = lines[len((folder / "a.jsonl").read_text()) :]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rest.encode(), mtime=0))
    pq.write_table(pa.table({"text": STORIES[40:50]}), folder / "c.parquet")
    for number in range(50, 60):
        (folder / f"d{number}.txt").write_text(STORIES[number])
    return folder


def run(inputs: Path | list[Path], output: Path, **changes: object) -> Prepared:
    arguments = {
        "tokenizer": ByteTokenizer(),
        "valid_fraction": 0.1,
        "shard_tokens": 2500,
        "workers": 1,
        "progress": False,
        **changes,
    }
    listed = inputs if isinstance(inputs, list) else [inputs]
    return prepare(listed, output, **arguments)  # type: ignore[arg-type]


def texts_in(folder: Path) -> list[str]:
    corpus = Corpus.open(folder)
    tokenizer = corpus.tokenizer()
    return [tokenizer.decode(corpus.read(d, 0, n)) for d, n in enumerate(corpus.lengths)]


def test_every_document_is_on_one_side_once_and_unchanged(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path / "out")
    both = texts_in(tmp_path / "out/train") + texts_in(tmp_path / "out/valid")
    assert sorted(both) == sorted(STORIES)


def test_documents_keep_the_order_of_the_inputs(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path / "out", valid_fraction=0)
    assert texts_in(tmp_path / "out/train") == STORIES


def test_the_result_says_what_was_written(inputs: Path, tmp_path: Path) -> None:
    result = run(inputs, tmp_path / "out")
    assert result.valid is not None and not result.reused
    assert result.train.documents + result.valid.documents == 60
    assert result.train.tokens == Corpus.open(tmp_path / "out/train").lengths.sum()
    assert len(result.train.shards) > 5


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_a_byte(
    inputs: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    run(inputs, tmp_path / "one", workers=1)
    run(inputs, tmp_path / "many", workers=workers)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "many")


def test_the_cut_into_blocks_does_not_change_a_byte(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(inputs, tmp_path / "large")
    monkeypatch.setattr(sources, "BLOCK_BYTES", 100)
    run(inputs, tmp_path / "small")
    assert snapshot(tmp_path / "large") == snapshot(tmp_path / "small")


def test_copies_of_a_document_are_on_the_same_side(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"in{number}.txt").write_text(story(number % 20))
    run(sorted(tmp_path.glob("*.txt")), tmp_path / "out", valid_fraction=0.3)
    train, valid = (set(texts_in(tmp_path / "out" / side)) for side in ("train", "valid"))
    assert valid and not train & valid


def test_more_documents_move_none_to_the_other_side(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path / "few")
    more = tmp_path / "more"
    more.mkdir()
    for number in range(60, 90):
        (more / f"{number}.txt").write_text(story(number))
    run([inputs, more], tmp_path / "many")
    assert set(texts_in(tmp_path / "few/valid")) <= set(texts_in(tmp_path / "many/valid"))


def test_the_share_held_out_is_the_one_asked_for() -> None:
    split = choose_split(STORIES, seed=0, valid_fraction=0.2)
    held = sum(split.side(split.identity(f"document {n}")) == "valid" for n in range(5000))
    assert 900 < held < 1100  # 1000 expected, standard deviation 28


def test_another_seed_holds_out_other_documents(inputs: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        run(inputs, tmp_path / f"{seed}", seed=seed, valid_fraction=0.3)
    assert texts_in(tmp_path / "0/valid") != texts_in(tmp_path / "1/valid")


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_small_corpus_has_a_document_on_each_side(tmp_path: Path, fraction: float) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(story(number))
    result = run(sorted(tmp_path.glob("*.txt")), tmp_path / "out", valid_fraction=fraction)
    assert result.valid is not None
    assert sorted((result.train.documents, result.valid.documents)) == [1, 2]


def test_without_a_held_out_share_there_is_no_valid_folder(inputs: Path, tmp_path: Path) -> None:
    assert run(inputs, tmp_path / "out", valid_fraction=0).valid is None
    assert not (tmp_path / "out/valid").exists()


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("the same")
    with pytest.raises(ValueError, match="needs 2 different documents.*hold 1; set --valid"):
        run([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_empty_documents_are_counted_and_left_out(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("one", "", "two", " \n ")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(tmp_path / "a.jsonl", tmp_path / "out", valid_fraction=0)
    assert (result.empty_documents, result.train.documents) == (2, 2)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.txt.gz"])
@pytest.mark.parametrize("place", [0, 1])
def test_an_empty_input_is_refused(tmp_path: Path, name: str, place: int) -> None:
    good, empty = tmp_path / "good.txt", tmp_path / name
    good.write_text("text")
    empty.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    listed = [good]
    listed.insert(place, empty)
    with pytest.raises(ValueError, match=f"{name} is empty: it holds no document"):
        run(listed, tmp_path / "out", valid_fraction=0)


def test_a_broken_line_met_by_a_worker_is_named(inputs: Path, tmp_path: Path) -> None:
    with open(inputs / "a.jsonl", "a") as stream:
        stream.write("{broken\n")
    with pytest.raises(ValueError, match=r"a.jsonl:\d+: not valid JSON"):
        run(inputs, tmp_path / "out", workers=2, valid_fraction=0)


def test_a_finished_output_is_left_as_it_is(inputs: Path, tmp_path: Path) -> None:
    first = run(inputs, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    again = run(inputs, tmp_path / "out")
    assert (again.reused, again.train) == (True, first.train)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}


def test_moved_inputs_are_still_the_same_inputs(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path / "out")
    assert run(inputs.rename(tmp_path / "elsewhere"), tmp_path / "out").reused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0 there, 1 now"),
        ({"valid_fraction": 0.2}, "--valid-fraction 0.1 there, 0.2 now"),
        ({"shard_tokens": 99}, "--shard-tokens 2500 there, 99 now"),
        ({"text_key": "body"}, "--text-key text there, body now"),
        (
            {"tokenizer": TokenizerTraining(300)},
            "--tokenizer bytes there, --train-tokenizer 300 now",
        ),
    ],
)
def test_other_settings_are_refused_by_name(
    inputs: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    run(inputs, tmp_path / "out")
    with pytest.raises(ValueError, match=f"{message}.*--force"):
        run(inputs, tmp_path / "out", **change)


def test_other_inputs_are_refused(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path / "out")
    (inputs / "d50.txt").write_text("changed")
    with pytest.raises(ValueError, match="inputs of 13 files and .* there, 13 files and"):
        run(inputs, tmp_path / "out")


def test_force_writes_anew_what_a_fresh_prepare_writes(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path / "out", shard_tokens=700)
    run(inputs, tmp_path / "out", seed=3, force=True)
    run(inputs, tmp_path / "fresh", seed=3)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_others_is_never_touched(inputs: Path, tmp_path: Path, force: bool) -> None:
    # A checkout has folders named train and data: --output . --force must not empty them.
    precious = tmp_path / "checkout/train/manifest.json"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    with pytest.raises(ValueError, match="holds files that `longhaul prepare` did not write"):
        run(inputs, tmp_path / "checkout", force=force)
    assert snapshot(tmp_path / "checkout") == {"train/manifest.json": b"precious"}


def test_force_leaves_foreign_files_in_its_folders(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path / "out")
    (tmp_path / "out/train/notes.md").write_text("mine")
    run(inputs, tmp_path / "out", force=True)
    assert (tmp_path / "out/train/notes.md").read_text() == "mine"


def test_a_finished_output_that_lost_a_shard_is_refused(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path / "out")
    (tmp_path / "out/train/shard-000001.tar").unlink()
    with pytest.raises(ValueError, match="finished and is damaged now: .*shard-000001.tar"):
        run(inputs, tmp_path / "out")


def test_two_prepares_do_not_share_an_output(inputs: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "out"):
        with pytest.raises(ValueError, match="another `longhaul prepare` is writing"):
            run(inputs, tmp_path / "out")


def test_an_output_inside_an_input_is_refused(inputs: Path) -> None:
    with pytest.raises(ValueError, match="lies inside the input"):
        run(inputs, inputs / "shards")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid_fraction": 1.0}, r"valid_fraction=1.0 is not in \[0, 1\)"),
        ({"valid_fraction": -0.1}, "valid_fraction=-0.1 is not in"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be at least 1"),
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"tokenizer": TokenizerTraining(300, 5)}, "sample_bytes=5 is too small"),
    ],
)
def test_impossible_settings_are_refused(
    inputs: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(inputs, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_trained_kept_and_used(inputs: Path, tmp_path: Path) -> None:
    result = run(inputs, tmp_path / "out", tokenizer=TokenizerTraining(350))
    assert result.train.tokenizer == "bpe-350"
    both = texts_in(tmp_path / "out/train") + texts_in(tmp_path / "out/valid")
    assert sorted(both) == sorted(STORIES)


def test_a_tokenizer_is_not_trained_on_held_out_documents(tmp_path: Path) -> None:
    secret = "xylophonist " * 400
    (tmp_path / "secret.txt").write_text(secret)
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(story(number))
    paths = sorted(tmp_path.glob("*.txt"))
    texts = [path.read_text() for path in paths]
    seed = next(
        seed
        for seed in range(100)
        if (split := choose_split(texts, seed=seed, valid_fraction=0.2))
        and [text for text in texts if split.side(split.identity(text)) == "valid"] == [secret]
    )
    training = TokenizerTraining(400)
    run(paths, tmp_path / "out", tokenizer=training, seed=seed, valid_fraction=0.2)
    vocab = json.loads((tmp_path / "out/train/tokenizer.json").read_text())["model"]["vocab"]
    assert "Ġmemory" in vocab and not any("xyl" in token for token in vocab)


def test_a_tokenizer_that_makes_no_token_is_refused(tmp_path: Path) -> None:
    class Silent(ByteTokenizer):
        """Loads as what it saves: a vocabulary without the text's characters."""

        def to_json(self) -> str:
            import tokenizers

            return tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0}, [])).to_str()

    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="a.txt: tokenizer bpe-1 makes no token of a text of 4"):
        run(tmp_path / "a.txt", tmp_path / "out", tokenizer=Silent(), valid_fraction=0)


def test_a_killed_worker_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text(story(number, 4000))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(sorted(tmp_path.glob("*.txt")), tmp_path / "out", workers=2, shard_tokens=10**6)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive() and not errors:
        for child in multiprocessing.active_children():
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.01)
    thread.join(timeout=30)
    assert len(errors) == 1 and "a worker process was killed" in str(errors[0])


def test_a_prepare_with_another_tokenizer_in_the_same_process_uses_it(
    inputs: Path, tmp_path: Path
) -> None:
    run(inputs, tmp_path / "out", tokenizer=TokenizerTraining(300))
    run(inputs, tmp_path / "out", force=True)
    assert Corpus.open(tmp_path / "out/train").manifest.tokenizer == "bytes"
    shutil.rmtree(tmp_path / "out")
