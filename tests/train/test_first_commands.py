"""What people type first, and what the command line makes of it."""

import shlex
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from tests.data.corpora import write_numbers
from tests.train.runs import ROOT, small, write
from tests.train.stored import store_run
from train.cli import app

QUICKSTART = ROOT / "configs/quickstart.yaml"
PREPARE = "longhaul prepare stdlib --output runs/quickstart-data --valid-fraction 0.1"


def longhaul(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def problem(*words: object) -> str:
    """Return what a command that is refused says."""
    error = longhaul(*words).exception
    assert isinstance(error, ValueError), error
    return str(error)


def test_the_version_is_the_installed_one() -> None:
    assert longhaul("--version").stdout == f"longhaul {version('longhaul')}\n"


@pytest.mark.parametrize("place", ["README.md", "Makefile", "configs/quickstart.yaml", "help"])
def test_the_quickstarts_data_are_prepared_alike_everywhere(place: str) -> None:
    if place == "help":
        texts = [longhaul("--help").stdout, longhaul("prepare", "--help").stdout]
    else:
        texts = [(ROOT / place).read_text()]
    for text in texts:
        lines = [line for line in text.splitlines() if "prepare stdlib" in line]
        assert lines and all(line.endswith(PREPARE.removeprefix("longhaul ")) for line in lines)


def test_a_layout_of_several_ranks_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    text = problem("pretrain", QUICKSTART, "name=a", "run_dir=a b", "--fork", "c")
    assert "world size 1 is not tp * cp * dp" in text
    assert text.splitlines()[-1].split() == shlex.split(
        f"torchrun --standalone --no-python --nproc-per-node 4 longhaul pretrain {QUICKSTART}"
    ) + ["name=a", "'run_dir=a", "b'", "--fork", "c"]


def test_other_problems_of_a_configuration_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    text = problem("pretrain", QUICKSTART, "train.lr=no")
    assert "train.lr" in text and "torchrun" not in text


def test_who_was_launched_is_not_told_how_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert "torchrun" not in problem("pretrain", QUICKSTART)


# the vocabulary of the data


def described(tmp_path: Path) -> Path:
    write_numbers(tmp_path / "books", [20, 20], vocab_size=1000)
    return write(tmp_path, small(data__train=str(tmp_path / "books")))


def test_plan_takes_the_vocabulary_from_the_data(tmp_path: Path) -> None:
    file = described(tmp_path)
    found, given = (
        longhaul("plan", file, "--gpus", 1, "--json", *words)
        for words in ([], ["--vocab-size", 1000])
    )
    assert found.exit_code == 0, found.exception
    assert found.stdout == given.stdout


def test_convert_mfu_takes_the_vocabulary_from_the_data(tmp_path: Path) -> None:
    assert longhaul("convert-mfu", described(tmp_path), "--mfu", "0.3").exit_code == 0


def test_without_data_the_vocabulary_is_asked_for_and_the_data_named(tmp_path: Path) -> None:
    file = write(tmp_path, small(data__train=str(tmp_path / "absent")))
    text = problem("plan", file, "--gpus", 1)
    assert "give --vocab-size" in text and f"{tmp_path}/absent/manifest.json does not exist" in text


def test_plan_says_for_which_ranks_it_looked(tmp_path: Path) -> None:
    file = write(tmp_path, small(train__batch_size=4))
    text = problem("plan", file)
    assert "batch_size: 4 is not a multiple of dp * micro_batch" in text
    assert "planned for 1 node of 8 ranks, as a node of h100 has" in text
    assert "of 3 ranks, by --gpus" in problem("plan", file, "--gpus", 3)


# submit


def test_submit_warns_of_data_that_are_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbers(tmp_path / "here", [20, 20])
    raw = small(
        data__train=[
            {"path": str(tmp_path / "here")},
            {"path": str(tmp_path / "absent")},
            {"path": "https://host/books"},
        ],
        data__cache_dir="/tmp/cache",
        data__valid=str(tmp_path / "valid"),
        model__init_from=str(tmp_path / "llama"),
        model__vocab_size=1 << 20,
    )
    monkeypatch.chdir(ROOT)
    done = longhaul("submit", write(tmp_path, raw), "--nodes", 1, "--dry-run")
    assert done.exit_code == 0, done.exception
    warned = [line for line in done.stderr.splitlines() if line.startswith("WARNING: ")]
    assert [line.split()[1:3] for line in warned] == [
        ["data.train:", f"{tmp_path}/absent"],
        ["data.valid:", f"{tmp_path}/valid"],
        ["model.init_from:", f"{tmp_path}/llama"],
    ]


# imported models


def imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder as `longhaul import` leaves it, as far as is looked at."""
    manifest: Any = SimpleNamespace(imported=True)
    monkeypatch.setattr("train.reading.verify.newest_manifest", lambda _: manifest)
    checkpoint = folder / "checkpoints/step-00000000"
    monkeypatch.setattr(
        "train.checkpoints.folder.choose_checkpoint", lambda _: (checkpoint, manifest)
    )
    model: Any = (None, SimpleNamespace(model=SimpleNamespace(memory=SimpleNamespace())))
    monkeypatch.setattr("train.checkpoints.snapshot.load_model", lambda *_: model)
    monkeypatch.setattr("train.evaluation.evaluate.chooses_by_later_tokens", lambda _: False)
    return folder


def test_an_imported_model_has_nothing_to_be_evaluated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = imported(tmp_path, monkeypatch)
    text = problem("evaluate", folder)
    assert "was imported, so it has no validation data" in text and "--data FOLDER" in text
    (tmp_path / "tokenizer.json").touch()
    assert f"--tokenizer {tmp_path}/tokenizer.json" in problem("evaluate", folder)


def test_an_imported_model_has_no_samples_to_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = problem("data", "verify", imported(tmp_path, monkeypatch))
    assert "holds an imported model: nothing was trained there" in text


# checkpoint show


def test_show_takes_a_run_for_its_newest_good_checkpoint(tmp_path: Path) -> None:
    *_, good, newest = store_run(tmp_path, 10, 20, 30)
    assert longhaul("checkpoint", "show", tmp_path).stdout.startswith(f"{newest}\n")
    (newest / "manifest.json").unlink()
    assert longhaul("checkpoint", "show", tmp_path).stdout.startswith(f"{good}\n")
    assert longhaul("checkpoint", "show", good).stdout.startswith(f"{good}\n")


def test_show_names_a_run_without_a_good_checkpoint(tmp_path: Path) -> None:
    (only,) = store_run(tmp_path, 10)
    (only / "manifest.json").unlink()
    assert "`longhaul checkpoint ls` says why" in problem("checkpoint", "show", tmp_path)


def test_configurations_that_are_shown_say_one_rank(tmp_path: Path) -> None:
    file = write(tmp_path, yaml.safe_dump(small()))
    assert "\n# 1 rank: tp 1" in longhaul("config", file, "--world-size", 1).stdout
