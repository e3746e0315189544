"""`longhaul evaluate` from the inside: what it measures, prints and writes."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.index import Corpus
from tests.train.evaluation.test_measure import (
    MEMORIES,
    VOCAB,
    S,
    corpus,
    make_model,
    write_documents,
)
from tests.train.runs import small
from train.evaluation.answers import Answered
from train.evaluation.evaluate import Tasks, run
from train.evaluation.questions import Place, summarise
from train.settings.config import validate

__all__ = ["corpus"]  # a fixture


def use_model(monkeypatch: pytest.MonkeyPatch, name: str, valid: Path | None) -> None:
    raw = small(
        data__segment_len=S,
        data__sample_len=2 * S,
        data__valid=str(valid) if valid else None,
        model__memory={"name": name} | ({"slots": 4} if name == "fam" else {}),
    )
    found = (make_model(MEMORIES[name]), validate(raw))
    manifest = SimpleNamespace(step=7, tokenizer_sha256=None, imported=False)
    monkeypatch.setattr(
        "train.checkpoints.folder.choose_checkpoint", lambda folder: (folder, manifest)
    )
    monkeypatch.setattr("train.checkpoints.snapshot.load_model", lambda folder, manifest, *_: found)


def test_the_command_measures_three_ways_and_writes_what_it_found(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_model(monkeypatch, "fam", corpus.folder)
    output = tmp_path / "results" / "page.html"
    assert run(Path("runs/small"), output=output) == 0
    printed, warned = capsys.readouterr()
    head = next(line for line in printed.splitlines() if "position" in line)
    assert head.split("  ")[-7:] == [
        "memory on", "memory off", "shuffled", "own window", "off - on", "shuffled - on",
        "own w. - on",
    ]  # fmt: skip
    assert "memory used: " in printed + warned
    assert re.search(r"^state: [\d,]+ bytes a stream, read at \S+ tokens/s$", printed, re.M)
    written = json.loads(output.with_suffix(".json").read_text())
    conditions = [entry["memory"] for entry in written["evaluations"]]
    assert conditions == ["on", "off", "shuffled", "beyond"]
    assert written["verdict"]["differences"].keys() == {"off", "shuffled", "beyond"}
    assert written["verdict"]["differences"]["off"]["passages"] > 1
    assert written["state_bytes"] > 0 and written["tokens_per_s"] > 0
    assert written["evaluations"][0]["positions"][0].keys() == {
        "first", "last", "tokens", "loss", "perplexity",
    }  # fmt: skip
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    page = output.read_text()
    for text in ("memory used", "fam (slots 4", "bytes a stream", "tokens/s", corpus.fingerprint):
        assert text in page


@pytest.mark.parametrize(("given", "stem"), [("loss.json", "loss"), ("folder", "folder/report")])
def test_a_report_is_three_files_of_one_name(
    given: str, stem: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_model(monkeypatch, "none", corpus.folder)
    run(Path("runs/small"), output=tmp_path / given)
    for end in (".html", ".json", ".png"):
        assert (tmp_path / (stem + end)).exists()


def test_a_memory_that_is_not_used_is_warned_of(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_model(monkeypatch, "fam", corpus.folder)
    run(Path("runs/small"))  # an untrained model
    assert capsys.readouterr().err.startswith("WARNING: memory used: ")


@pytest.mark.parametrize(
    ("name", "memory", "column"), [("none", True, "memory on"), ("fam", False, "memory off")]
)
def test_the_command_measures_one_way_where_one_is_enough(
    name: str,
    memory: bool,
    column: str,
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_model(monkeypatch, name, None)
    assert run(Path("runs/small"), data=corpus.folder, memory=memory) == 0
    printed, warned = capsys.readouterr()
    assert printed.splitlines()[2].split("  ")[-1] == column
    assert "WARNING" not in warned


def test_tasks_are_asked_before_the_loss_and_shown_after(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.train.evaluation.test_report import Result, cell

    use_model(monkeypatch, "fam", corpus.folder)
    asked: dict[str, Any] = {}

    def run_tasks(model: Any, config: Any, tokenizer: Any, **options: Any) -> list[Result]:
        asked.update(options)
        return [Result("passkey", (cell(64, 0.5), cell(128, 0.5)), "no")]

    monkeypatch.setattr("train.evaluation.questions.run_tasks", run_tasks)
    monkeypatch.setattr("train.evaluation.questions.describe", lambda result: "said in words")
    monkeypatch.setattr("data.index.Corpus.tokenizer", lambda self: None)
    monkeypatch.setattr("data.tasks.corpus_texts", lambda corpus, tokens: ["text"])
    tasks = Tasks(["passkey", "facts"], lengths=[64, 128], prompts=5)
    run(Path("runs/small"), tokens=64, tasks=tasks, output=tmp_path / "r.html")
    assert asked["names"][0] == "passkey" and len(asked["names"]) > 2
    assert all(name.startswith("story_") for name in asked["names"][1:])
    assert (asked["lengths"], asked["prompts"]) == ([64, 128], 5)
    printed, warned = capsys.readouterr()
    assert "said in words" in printed and "0.97 [0.84, 0.99]" in printed
    assert "WARNING: passkey: memory used: no" in warned
    assert "Task: passkey" in (tmp_path / "r.html").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["tasks"] == [{"task": "passkey"}]


def test_tasks_are_tracked_beside_the_loss(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, "fam", corpus.folder)
    right = [Answered(True, j > 2, False, True) for j in range(4)]
    result = summarise("passkey", [(Place(64, 0.5, None), right)])
    monkeypatch.setattr("train.evaluation.questions.run_tasks", lambda *_, **__: [result])
    monkeypatch.setattr("data.index.Corpus.tokenizer", lambda self: None)
    monkeypatch.setattr("data.tasks.corpus_texts", lambda corpus, tokens: ["text"])
    logged: dict[str, float] = {}

    @contextmanager
    def tracker(*run: Any) -> Iterator[Any]:
        yield SimpleNamespace(
            metrics=lambda values, step: logged.update(values), event=lambda text, step: None
        )

    monkeypatch.setattr("train.evaluation.tracked.open_tracker", tracker)
    run(Path("runs/small"), tokens=64, tasks=Tasks(["passkey"]), track=True)
    assert logged["evaluate/passkey/on_off"] == 0.75
    assert logged["evaluate/passkey/off"] == 0.25
    assert logged["evaluate/passkey/on_64_tokens_depth_0.5"] == 1.0
    assert logged["evaluate/passkey/memory_used"] in (-1.0, 0.0, 1.0)
    assert "evaluate/loss" in logged and "evaluate/passkey/tokens_per_s" not in logged


def test_the_command_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, "none", None)
    with pytest.raises(ValueError, match="--data FOLDER"):
        run(Path("runs/small"))
    write_documents(tmp_path, [np.arange(60)], vocab_size=VOCAB + 20)
    with pytest.raises(ValueError, match="tokens up to 69, the model's vocab_size is 50"):
        run(Path("runs/small"), data=tmp_path)
