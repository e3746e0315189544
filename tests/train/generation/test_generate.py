"""`longhaul generate`: reading prompts, writing on, and what is refused."""

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.tokenizer import ByteTokenizer
from model.sampling import Sampling
from tests.train.runs import longhaul
from tests.train.runs import write as write_yaml
from tests.train.tiny import Shards, tiny
from train.checkpoints.folder import choose_checkpoint
from train.checkpoints.snapshot import load_model, read_model
from train.generation import writing
from train.generation.generate import run
from train.generation.writing import Wanted, encoded, never, open_tokenizer, write

WORDS = ByteTokenizer()


def tokens_of(text: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    monkeypatch.setattr(writing, "PIECE_CHARACTERS", piece)
    return list(encoded(io.StringIO(text), WORDS, "text"))


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_a_prompt_in_pieces_is_the_prompt(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one two\nthree four five\n\nsix \u00e9\u4e2d end"
    pieces = tokens_of(text, piece, monkeypatch)
    assert bytes(torch.cat(pieces).tolist()).decode() == text


def test_pieces_end_with_lines_so_that_tokens_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces = tokens_of("aaa bbb\nccc ddd\neee", 10, monkeypatch)
    assert [bytes(p.tolist()) for p in pieces] == [b"aaa bbb\n", b"ccc ddd\n", b"eee"]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="text is empty; a prompt needs at least one token"):
        list(encoded(io.StringIO(""), WORDS, "text"))


def written(text: str, stop: tuple[str, ...] = (), max_tokens: int = 100) -> list[str]:
    """What is shown of a model that writes this text, then ends its document."""
    ids = [*text.encode(), WORDS.end_of_document]
    step = iter(torch.nn.functional.one_hot(torch.tensor(ids), 257).float() * 100)
    wanted = Wanted(max_tokens, Sampling(temperature=0), stop)
    return list(write(next(step), lambda token: next(step), WORDS, wanted, []))


def test_a_text_is_written_until_its_document_ends() -> None:
    assert "".join(written("a text")) == "a text"
    assert "".join(written("a text", max_tokens=3)) == "a t"
    assert written("a text", max_tokens=0) == []


def test_a_character_is_shown_when_it_is_whole() -> None:
    assert written("\u00e9\u4e2d!") == ["\u00e9", "\u4e2d", "!"]


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (("END",), "text "),
        (("t E", "END"), "tex"),
        (("ENDX",), "text END, on"),
        (("text",), ""),
        (("ENT", "ON"), "text END, on"),
    ],
)
def test_a_stop_text_is_never_shown(stop: tuple[str, ...], shown: str) -> None:
    assert "".join(written("text END, on", stop)) == shown


@pytest.mark.parametrize(
    ("values", "message"),
    [({"max_tokens": -1}, "max_tokens=-1 is below 0"), ({"stop": ("",)}, "stop: '' is in every")],
)
def test_wishes_without_meaning_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wanted(**values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Shards) -> dict[str, Path]:
    """A finished run for each kind of model, untrained but for two steps."""
    found = {}
    for name in ("fam", "none"):
        folder: Path = tmp_path_factory.mktemp(name)
        raw = tiny(folder / "run", shards, train__steps=2, train__warmup_steps=1)
        if name == "none":
            raw["model"]["memory"] = {"name": "none"}
        ended = longhaul("pretrain", write_yaml(folder, raw))
        assert ended.returncode == 0, ended.stderr
        found[name] = folder / "run"
    return found


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("words and more words\n" * 30)
    return path


SHORT = Wanted(max_tokens=4, sampling=Sampling(temperature=0))


def test_a_long_prompt_is_continued(
    runs: dict[str, Path], prompt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(runs["fam"], str(prompt), SHORT) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "read 630 tokens in" in err and "tokens/s" in err and "memory: " in err


def test_the_command_reads_standard_input_and_is_reproducible(
    runs: dict[str, Path], prompt: Path
) -> None:
    def text(*options: object) -> str:
        ended = longhaul("generate", runs["fam"], "--prompt", prompt, "--max-tokens", 8, *options)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert text("--seed", 3) == text("--seed", 3)


def test_a_model_without_memory_says_what_to_do_about_a_long_prompt(
    runs: dict[str, Path], prompt: Path
) -> None:
    with pytest.raises(ValueError, match="it cannot stream; use --context truncate"):
        run(runs["none"], str(prompt), SHORT)


def test_merging_is_shown_beside_truncation(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("some words " * 2)
    run(runs["none"], str(path), SHORT, context="homer", suffix_tokens=2)
    out = capsys.readouterr().out
    assert out.index("--- truncate: ") < out.index("--- homer: ")


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("fam", "x", {"context": "homer"}, "is for models without memory"),
        ("fam", "", {}, "is empty; a prompt needs at least one token"),
        ("none", "x", {"wanted": Wanted(max_tokens=16)}, "leaves no room for a prompt"),
    ],
)
def test_bad_wishes_have_one_clear_error(
    runs: dict[str, Path], tmp_path: Path, name: str, text: str, options: dict, message: str
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        run(runs[name], str(path), **({"wanted": SHORT} | options))


def test_the_memory_may_do_otherwise_than_in_training(runs: dict[str, Path]) -> None:
    model, _ = read_model(runs["fam"], ["beta=8", "state=latch"])
    assert (model.config.memory.beta, model.config.memory.state) == (8.0, "latch")
    with pytest.raises(ValueError, match="a change of the memory that changes its parameters"):
        read_model(runs["fam"], ["slots=6"])
    with pytest.raises(ValueError, match="model.memory.retrieve: unknown key"):
        read_model(runs["fam"], ["retrieve=4"])


def test_files_that_are_no_prompt_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        run(runs["fam"], str(tmp_path / "missing"), SHORT)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        run(runs["fam"], str(tmp_path / "bytes"), SHORT)


def test_data_that_are_gone_have_their_tokenizer_named(runs: dict[str, Path]) -> None:
    path, manifest = choose_checkpoint(runs["fam"])
    model, config = load_model(path, manifest)
    gone = config.model_copy(
        update={"data": config.data.model_copy(update={"train": Path("gone"), "valid": None})}
    )
    with pytest.raises(ValueError, match="give the same one with --tokenizer FILE"):
        open_tokenizer(model, gone, path, manifest, None)
    assert never(model, WORDS) == []
