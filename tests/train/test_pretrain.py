"""A run as a user has it: started, tracked, continued and evaluated from the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.attempts import losses, read_rows
from tests.train.runs import longhaul, write
from tests.train.tiny import Shards, tiny
from train.settings.config import load, validate
from train.tracking.timeline import read_events
from train.watch.attempt import node_name

TRACKED: dict[str, Any] = {"enabled": True, "experiment": "quick"}

# As users look at it; a process of its own, for mlflow starts threads and these tests fork.
READ_STORE = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
found = []
for run in runs:
    id = run.info.run_id
    found.append({
        "id": id, "name": run.info.run_name, "status": run.info.status,
        "experiment": client.get_experiment(run.info.experiment_id).name,
        "params": run.data.params, "tags": run.data.tags,
        "history": {
            key: [(m.step, m.value) for m in client.get_metric_history(id, key)]
            for key in run.data.metrics
        },
        "files": {
            file.path: file.file_size for file in client.list_artifacts(id)
        },
    })
print(json.dumps(found))
"""


def read_store(run_dir: Path) -> list[dict[str, Any]]:
    """Return what a run's store has, behind what a busy machine left to be sent."""
    sent = longhaul("track", "sync", run_dir)
    assert sent.returncode == 0, sent.stderr
    uri = f"sqlite:///{run_dir}/tracking/mlflow.db"
    text = subprocess.run(
        [sys.executable, "-P", "-c", READ_STORE, uri], capture_output=True, text=True, check=True
    ).stdout
    found: list[dict[str, Any]] = json.loads(text)
    return found


def start(folder: Path, raw: dict[str, Any], *words: str) -> str:
    """Train as the command line does, alone; return what was said."""
    ended = longhaul("pretrain", write(folder, raw), *words, MLFLOW_TRACKING_URI="")
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: Shards) -> tuple[Path, str]:
    """Return the folder of a finished run without tracking, and what it said."""
    folder: Path = tmp_path_factory.mktemp("finished")
    raw = tiny(folder / "run", shards, train__steps=4, checkpoint__every=2, train__eval_every=3)
    return folder / "run", start(folder, raw, "train.log_every=1")


def test_a_run_leaves_its_log_checkpoints_picture_and_done(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    assert [row["step"] for row in read_rows(run_dir)] == [1, 2, 3, 4]
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")) == [
        "step-00000002",
        "step-00000004",
    ]
    assert (run_dir / "summary.png").read_bytes().startswith(b"\x89PNG")
    for name in ("report.html", "report.json", "report.png"):
        assert (run_dir / name).stat().st_size > 0
    assert (run_dir / "DONE").read_text() == "4\n"
    assert not (run_dir / "tracking").exists()


def test_the_saved_configuration_is_the_resolved_one(
    finished: tuple[Path, str], shards: Shards
) -> None:
    run_dir, _ = finished
    changes = {"train__steps": 4, "checkpoint__every": 2, "train__eval_every": 3}
    expected = validate(tiny(run_dir, shards, **changes, train__log_every=1))
    assert load(run_dir / "config.yaml") == expected


def test_a_row_holds_what_a_plot_needs(finished: tuple[Path, str]) -> None:
    row = read_rows(finished[0])[-1]
    assert row.keys() == {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "targets",
        "tokens_per_s",
        "mfu",
        "time",
    }
    assert all(isinstance(value, float | int) for value in row.values())


def test_the_run_says_what_it_is_and_how_to_go_on(finished: tuple[Path, str]) -> None:
    run_dir, text = finished
    assert "tiny: memory fam, TP 1 x CP 1 x DP 1, ZeRO 1, fp32 | 1 rank on cpu" in text
    assert "step 3 | valid/loss " in text
    assert "step 4 | valid/loss_memory_off " in text
    assert f"saved {run_dir}/checkpoints/step-00000004" in text
    assert "step 3 | valid/loss_memory_shuffled " in text
    assert "step 4 | valid/loss_memory_beyond " in text  # it has a window
    assert "WARNING: memory used: " in text  # after four steps
    assert "train.steps=8" in text.splitlines()[-1]


def test_the_loss_falls(tmp_path: Path, finished: tuple[Path, str]) -> None:
    found = [loss for _, loss, _, _ in losses(finished[0])]
    assert found[0] == pytest.approx(5.6, abs=0.4)  # log 257, nothing learned yet
    assert found[-1] < 0.9 * found[0]


def test_the_run_folder_is_evaluated(finished: tuple[Path, str], tmp_path: Path) -> None:
    run_dir, text = finished
    output = tmp_path / "loss.json"
    ended = longhaul("evaluate", run_dir, "--tokens", "256", "--output", output)
    assert ended.returncode == 0, ended.stderr
    assert "memory on" in ended.stdout and "shuffled - on: " in ended.stdout
    assert "WARNING: memory used: " in ended.stderr
    values = json.loads(output.read_text())
    conditions = [evaluation["memory"] for evaluation in values["evaluations"]]
    assert conditions == ["on", "off", "shuffled", "beyond"]
    assert output.with_suffix(".png").exists() and output.with_suffix(".html").exists()
    # one process with the joined weights finds what the run found at its end
    said = next(line for line in text.splitlines() if "step 4 | valid/loss " in line)
    assert values["evaluations"][0]["loss"] == pytest.approx(float(said.split()[-1]), abs=1e-4)


@pytest.mark.slow
def test_a_tracked_run_has_everything_and_goes_on_under_its_id(
    tmp_path: Path, shards: Shards
) -> None:
    run_dir = tmp_path / "run"
    raw = tiny(run_dir, shards, train__steps=4, tracking=TRACKED, train__log_every=2)
    text = start(tmp_path, raw)
    assert "tracking" in text
    (run,) = read_store(run_dir)
    assert (run["name"], run["experiment"], run["status"]) == ("tiny", "quick", "FINISHED")
    rows = {row["step"]: row for row in read_rows(run_dir)}
    history = run["history"]
    assert [step for step, _ in history["loss"]] == [1, 2, 4]
    for name in ("loss", "grad_norm", "lr", "targets", "tokens_per_s", "mfu"):
        assert history[name] == [[step, rows[step][name]] for step in (1, 2, 4)]
    assert {"save_s", "valid/loss", "valid/loss_memory_off"} <= history.keys()
    assert {"valid/shuffled_minus_on_low", "valid/memory_used"} <= history.keys()
    assert any(name.startswith("memory/rms_fam_slots") for name in history)
    expected = {"train.lr": "0.01", "model.memory.name": "fam", "train.batch_size": "4"}
    assert expected.items() <= run["params"].items()
    names = {"config.yaml", "environment.txt", "data_manifest.json", "summary.png"}
    names |= {"report.html"}
    assert names <= run["files"].keys()
    assert all(run["files"][name] > 0 for name in names)
    assert {"formula.mfu", "peak", "host"} <= run["tags"].keys()
    assert run["tags"]["attempt"] == "1" and run["tags"]["attempt.1.from_step"] == "0"
    assert run["tags"]["attempt.1.nodes"] == node_name()
    assert history["events/saved"] == [[4, 1.0]] and history["events/finished"] == [[4, 1.0]]

    start(tmp_path, raw, "train.steps=6")
    (again,) = read_store(run_dir)
    assert again["id"] == run["id"]
    assert again["status"] == "FINISHED"
    assert [step for step, _ in again["history"]["loss"]] == [1, 2, 4, 6]
    # MLflow keeps the first value of a parameter; the new one is told beside it
    assert again["params"]["train.steps"] == "4"
    assert again["tags"]["changed.train.steps"] == "6"
    # one run tells of both attempts
    assert again["tags"]["attempt"] == "2" and again["tags"]["attempt.2.from_step"] == "4"
    assert {"attempt.1.nodes", "attempt.2.nodes"} <= again["tags"].keys()
    assert again["history"]["events/started"] == [[0, 1.0], [4, 2.0]]
    assert again["history"]["events/resumed"] == [[4, 1.0]]
    kinds = [event["kind"] for event in read_events(run_dir)]
    assert kinds == ["started", "saved", "finished", "started", "resumed", "saved", "finished"]


@pytest.mark.slow
def test_fresh_sets_the_old_run_aside(tmp_path: Path, shards: Shards) -> None:
    run_dir = tmp_path / "run"
    raw = tiny(run_dir, shards, train__steps=3)
    start(tmp_path, raw)
    first = (run_dir / "log.jsonl").read_text()
    raw["model"]["num_layers"] = 1
    start(tmp_path, raw, "--fresh")
    (aside,) = (path for path in tmp_path.glob("run.*") if path.is_dir())
    assert (aside / "log.jsonl").read_text() == first
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["num_layers"] == 1
