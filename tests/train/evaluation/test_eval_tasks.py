"""train.eval_tasks: questions asked inside training, on ranks, told and written down."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.train.attempts import finish
from tests.train.runs import longhaul, problems, small
from tests.train.runs import write as write_yaml
from tests.train.test_pretrain import TRACKED, read_store
from tests.train.tiny import Shards, build_tiny, tiny
from train.evaluation.evaluate import write_files
from train.evaluation.held_out import HeldOut
from train.settings.config import ConfigError, validate
from train.signals import StopAgreed
from train.starting.inputs import open_inputs

SIZES: dict[str, Any] = {
    "data__segment_len": 96,
    "data__sample_len": 192,
    "train__batch_size": 2,
    "train__eval_prompts": 2,
}
ASKED = {**SIZES, "train__eval_tasks": ["passkey", "recall"]}


class Log:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.events: list[str] = []
        self.files: list[str] = []
        self.text: list[str] = []  # that facts were hidden in

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))

    def event(self, text: str, step: int) -> None:
        self.events.append(text)

    def artifact(self, path: Path, folder: str = "") -> None:
        self.files.append(path.name)


def ask(raw: dict[str, Any], stops: bool) -> tuple[Log, list[str], dict[str, Any]]:
    """Runs on a rank: two evaluations, of which the second compares; stops: among its questions."""
    config = validate(raw)
    built, mesh, inputs = build_tiny(config)
    assert inputs.valid is not None and inputs.questions is not None
    if mesh.rank == 1:  # as where one node left out a damaged file
        inputs.questions.filler.pieces.reverse()
        inputs.questions.filler.counts.reverse()
    log, said, calls = Log(), [], 0
    questions: Any = inputs.questions
    ask_them = questions.ask

    def ask(*reader: Any, **options: Any) -> Any:
        nonlocal calls
        calls = 1
        return ask_them(*reader, **options)

    def check_stop() -> None:
        nonlocal calls
        calls += calls > 0
        if stops and calls == 10:
            raise StopAgreed

    questions.ask = ask
    tracker: Any = log
    page = {"title": "tiny", "folder": config.run_dir, "questions": inputs.questions}
    own = HeldOut(config, inputs.valid, built, mesh, tracker, said.append, check_stop, **page)
    log.text = questions.filler.pieces
    own.evaluate(1, compare=False)
    written = config.run_dir / "report.json"
    assert not written.exists()
    try:
        own.evaluate(2, compare=True)
    except StopAgreed:
        said.append("stopped")
    return log, said, json.loads(written.read_text()) if mesh.rank == 0 and not stops else {}


@pytest.mark.gloo
def test_ranks_ask_tell_log_and_write(tmp_path: Path, shards: Shards) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    raw = tiny(run_dir, shards, **ASKED, parallel__cp=2, parallel__zero=3)
    (log, said, page), (other, _, _) = run_ranks(2, ask, raw, False)
    assert log.text == other.text
    (first, plain), (second, values) = log.rows
    assert (first, second) == (1, 2)
    assert not [name for name in plain if "passkey" in name]
    for task in ("passkey", "recall"):
        assert {f"valid/{task}/{name}" for name in (
            "on", "off", "shuffled", "on_off", "on_off_low", "on_shuffled_high", "memory_used",
            "state_bytes", "tokens_per_s",
        )} <= values.keys()  # fmt: skip
        assert f"step 2 | WARNING: {task}: memory used: unclear" in said
        assert f"WARNING: {task}: memory used: unclear" in log.events
        words = next(line for line in said if line.startswith(f"step 2 | {task}: memory used: "))
        assert "bytes a stream" in words and "tokens/s" in words
    assert {"valid/passkey/on_384_tokens_depth_0", "valid/recall/on_1536_tokens_pairs_16"} <= (
        values.keys()
    )
    same = {name: x for name, x in values.items() if not name.endswith("tokens_per_s")}
    assert same.items() <= other.rows[1][1].items()
    assert [task["task"] for task in page["tasks"]] == ["passkey", "recall"]
    assert page["step"] == 2 and page["tasks"][0]["cells"][0]["n"] == 2
    assert page["tasks"][0]["state_bytes"] > 0 < page["tasks"][0]["tokens_per_s"]
    assert "Task: passkey" in (run_dir / "report.html").read_text()
    names = ["report.html", "report.json", "report.png"]
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(log.files) == names


@pytest.mark.gloo
def test_a_run_asks_at_its_evaluations_and_at_its_end(tmp_path: Path, shards: Shards) -> None:
    raw = tiny(
        tmp_path / "run", shards, **ASKED, train__steps=3, train__eval_every=2, parallel__tp=2
    )
    config = validate(raw | {"train": raw["train"] | {"eval_compare": False}})
    text = finish(2, config)
    assert "step 2 | valid/loss " in text and "step 2 | passkey" not in text
    assert text.count("step 3 | passkey: memory used: ") == 1  # rank 0 alone says it
    page = json.loads((config.run_dir / "report.json").read_text())
    assert page["step"] == 3
    assert [task["task"] for task in page["tasks"]] == ["passkey", "recall"]


@pytest.mark.gloo
def test_without_memory_nobody_is_warned(tmp_path: Path, shards: Shards) -> None:
    raw = tiny(tmp_path, shards, **{**SIZES, "train__eval_tasks": "passkey"}, model__memory="none")
    ((log, said, page),) = run_ranks(1, ask, raw, False)
    assert page["tasks"][0]["on_off"]["value"] == 0.0
    assert any("passkey: memory used: " in line for line in said)
    assert not log.events and not any("WARNING" in line for line in said)


@pytest.mark.gloo
def test_a_stop_among_the_questions_leaves_nothing_told(tmp_path: Path, shards: Shards) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    raw = tiny(run_dir, shards, **{**ASKED, "train__eval_tokens": 96})
    ((log, said, _),) = run_ranks(1, ask, raw, True)
    assert said[-1] == "stopped" and [step for step, _ in log.rows] == [1]
    assert not list(run_dir.iterdir())


@pytest.mark.parametrize("failing", ["picture", "page"])
def test_a_report_is_the_old_one_or_the_new_one(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.train.evaluation.test_verdict import compared
    from train.evaluation.report import Report

    old, new = (Report(title, [], compared([0.1, 0.12])) for title in ("old", "new"))
    write_files(tmp_path / "r.html", old, {"step": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"r.html", "r.json", "r.png"}

    def broken(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    places = {
        "picture": "train.tracking.picture.plot_evaluation",
        "page": "train.evaluation.evaluate.write_report",
    }
    monkeypatch.setattr(places[failing], broken)
    with pytest.raises(OSError, match="No space"):
        write_files(tmp_path / "r.html", new, {"step": 2})
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_a_tracked_run_has_its_tasks(tmp_path: Path, shards: Shards) -> None:
    run_dir = tmp_path / "run"
    raw = tiny(run_dir, shards, **SIZES, train__steps=2, train__warmup_steps=1, tracking=TRACKED)
    words = ["train.eval_tasks=passkey", "train.eval_every=1"]
    ended = longhaul("pretrain", write_yaml(tmp_path, raw), *words, MLFLOW_TRACKING_URI="")
    assert ended.returncode == 0, ended.stderr
    for step in (1, 2):
        assert f"step {step} | passkey: memory used: " in ended.stderr
    page = json.loads((run_dir / "report.json").read_text())
    assert page["step"] == 2 and [task["task"] for task in page["tasks"]] == ["passkey"]
    track = ["--tasks", "passkey", "--prompts", "2", "--lengths", "384", "--tokens", "192"]
    asked = longhaul("evaluate", run_dir, *track, "--track", MLFLOW_TRACKING_URI="")
    assert asked.returncode == 0, asked.stderr
    assert "state: " in asked.stdout and asked.stdout.count("bytes a stream") == 2
    assert asked.stdout.count("tokens/s") == 2
    (run,) = read_store(run_dir)
    assert [step for step, _ in run["history"]["valid/passkey/on"]] == [1, 2]
    assert [step for step, _ in run["history"]["evaluate/passkey/on_off"]] == [2]
    assert {"report.html", "report.json", "report.png"} <= run["files"].keys()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"train__eval_tasks": ["passkeys"], "data__valid": "shards/valid"},
            "train.eval_tasks: 'passkeys' is not one of passkey, recall, facts, story_person,"
            " story_thing, story_yes_no, story_count; did you mean 'passkey'?",
        ),
        (
            {"train__eval_tasks": "passkey, recall"},
            "train.eval_tasks: passkey, recall: questions are hidden in the text of data.valid,"
            " which is not set; give a prepared folder, or use []",
        ),
        (
            {"train__eval_tasks": "pubmedqa", "data__valid": "shards/valid"},
            "train.eval_tasks: pubmedqa needs the folder of its files, and is asked of a checkpoint"
            " only: leave it out, and run `longhaul evaluate RUN --tasks pubmedqa --pubmedqa"
            " FOLDER`",
        ),
        ({"train__eval_prompts": 1}, "train.eval_prompts: 1 is too small; the least is 2"),
    ],
)
def test_what_cannot_be_asked_is_said(changes: dict[str, Any], line: str) -> None:
    assert problems(small(**changes)) == (line,)


def test_a_question_longer_than_a_segment_is_refused_before_ranks_start(
    tmp_path: Path, shards: Shards
) -> None:
    raw = tiny(tmp_path / "run", shards, train__eval_tasks="passkey")
    with pytest.raises(ConfigError, match="train.eval_tasks: question and answer of passkey take"):
        open_inputs(validate(raw))


def test_names_are_a_list_or_a_text() -> None:
    given = ({"train__eval_tasks": value} for value in (["facts"], "facts,", "facts"))
    for changes in given:
        config = validate(small(**changes, data__valid="shards/valid"))
        assert config.train.eval_tasks == ("facts",)
    assert validate(small()).train.eval_tasks == ()
