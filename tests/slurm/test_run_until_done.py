"""What lib.sh does at an attempt's beginning and end; SLURM and the ranks' launch are stubbed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import ROOT, small, write
from train.cluster.attempts import begin

SCRIPT = """
set -euo pipefail
source slurm/lib.sh
scontrol() { if [[ $2 == hostnames ]]; then echo node1; fi; }
squeue() { tr , '\n' <<<"${RUNNING:-}"; }
check_nodes() { :; }
back_to_queue() { echo "REQUEUED without '$1'"; }
launch() {
  echo "RANKS of $RUN_DIR: $*"
  bash -c "$RANKS_DO" &
  STEP_PID=$!
}
run_until_done "$@"
"""


def attempt(
    run_dir: Path, *command: object, ranks: str = "true", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Return one attempt of a job at `command`; ranks: what bash does in their place."""
    return subprocess.run(
        ["bash", "-c", SCRIPT, "job", "1", *map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RUN_DIR": str(run_dir),
            "LEAD_S": "60",
            "RANKS_DO": ranks,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node1",
            **environment,
        },
    )


def rows(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]


def test_a_command_that_is_not_longhauls_is_done_when_it_exits_with_0(tmp_path: Path) -> None:
    done = attempt(tmp_path / "run", "hostname")
    assert done.returncode == 0, done.stderr
    assert "REQUEUED" not in done.stdout
    assert rows(tmp_path / "run")[-1]["status"] == "done"


def test_ranks_of_longhaul_that_leave_no_done_are_started_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ("longhaul", "pretrain", write(tmp_path, small()), f"run_dir={run_dir}")
    again = attempt(run_dir, *command)
    assert "REQUEUED without ''" in again.stdout, again.stderr
    assert rows(run_dir)[-1]["status"] == "stopped"
    done = attempt(run_dir, *command, ranks=f"touch {run_dir}/DONE")
    assert "REQUEUED" not in done.stdout
    assert rows(run_dir)[-1]["status"] == "done"


def test_a_forks_attempts_are_written_down_in_its_own_folder(tmp_path: Path) -> None:
    parent, fork = tmp_path / "parent", tmp_path / "fork"
    parent.mkdir()
    (parent / "DONE").touch()
    file = write(tmp_path, small())
    command = ("longhaul", "pretrain", file, f"run_dir={parent}", "--fork", "fork")
    again = attempt(parent, *command, ranks='echo "notes in $ATTEMPT_FOLDER"')
    assert f"attempt 1 of {fork}\n" in again.stdout, again.stderr
    assert f"RANKS of {fork}: 1 {' '.join(map(str, command))}\n" in again.stdout
    assert f"notes in {fork}/attempt\n" in again.stdout
    assert [row["attempt"] for row in rows(fork)] == [1, 1]
    assert [path.name for path in parent.iterdir()] == ["DONE"]


def test_a_fork_that_is_refused_touches_no_folder(tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "DONE").touch()
    command = ("longhaul", "pretrain", write(tmp_path, small()), f"run_dir={tmp_path}/parent")
    refused = attempt(tmp_path / "parent", *command, "--fork", "stranger")
    assert refused.returncode == 2
    assert "is another run's folder already; give another name" in refused.stderr
    assert "RANKS" not in refused.stdout and "REQUEUED" not in refused.stdout
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["DONE", "run.yaml", "stranger"]


@pytest.mark.parametrize(
    ("running", "refused"), [("6", True), ("16,6,7", True), ("7", False), ("", False)]
)
def test_a_folder_in_which_another_job_trains_is_refused(
    tmp_path: Path, running: str, refused: bool
) -> None:
    begin(tmp_path / "run", job="6", nodes=["node2"], lost=[])
    second = attempt(tmp_path / "run", "hostname", RUNNING=running)
    if refused:
        assert second.returncode == 2
        assert f"job 6 has an attempt in {tmp_path}/run and still has nodes" in second.stderr
        assert "scancel 6" in second.stderr
        assert len(rows(tmp_path / "run")) == 1, "its attempt is open yet"
    else:
        assert second.returncode == 0, second.stderr
        assert [row.get("status") for row in rows(tmp_path / "run")] == [
            None, "stopped", None, "done",
        ]  # fmt: skip
