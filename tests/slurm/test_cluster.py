"""The job scripts on a real SLURM of pretend nodes: accepted, run, failed, finished."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import COUNTING_RANKS, ROOT, START_S, Job
from tests.train.attempts import finish, losses
from tests.train.runs import write
from tests.train.tiny import prepare_shards, tiny
from train.settings.config import validate

pytestmark = [pytest.mark.slow, pytest.mark.gloo, pytest.mark.slurm]


def test_slurm_accepts_the_8b_job(cluster: Cluster) -> None:
    answer = cluster.run("sbatch", "--test-only", f"--chdir={ROOT}", "slurm/pretrain_8b.sh")
    assert answer.returncode == 0, answer.stdout
    assert "node[1-8]" in answer.stdout


def test_slurm_refuses_more_nodes_than_there_are(cluster: Cluster) -> None:
    answer = cluster.run("sbatch", "--test-only", "--nodes=9", "slurm/pretrain_8b.sh")
    assert answer.returncode != 0


def test_slurm_accepts_what_submit_renders(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    command = f"longhaul submit configs/pretrain_8b.yaml run_dir={tmp_path}/run --nodes 8 --dry-run"
    warned = cluster.run("bash", "-c", f"{command} >{script}", cwd=ROOT).stdout
    answer = cluster.run("sbatch", "--test-only", f"--chdir={ROOT}", str(script))
    assert answer.returncode == 0, script.read_text() + answer.stdout
    assert "shards/train holds no prepared shards here" in warned


def test_ranks_of_two_nodes_run_to_the_end(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "python", COUNTING_RANKS, str(tmp_path), "3", ranks=2)
    job.finish()
    assert all(f"rank {rank} of 4 begins at step 0" in job.log for rank in range(4)), job.log
    assert [row["status"] for row in job.ends] == ["done"]


def test_a_submitted_run_passes_preflight_and_finishes(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    raw = tiny(run_dir, prepare_shards(tmp_path), train__steps=3, parallel={"cp": 2})
    words = ("longhaul", "submit", str(write(tmp_path, raw)), "--nodes", "2", "--cpu")
    options = ("--ranks-per-node", "1", f"--option=--output={tmp_path}/job.out")
    answer = cluster.run(*words, *options, cwd=ROOT)
    assert answer.returncode == 0, answer.stdout
    number = answer.stdout.split()[1].rstrip(":")
    found = cluster.wait_for(number, "COMPLETED", "FAILED", timeout_s=300)
    log = (tmp_path / "job.out").read_text()
    assert found["JobState"] == "COMPLETED", log
    assert (run_dir / "DONE").exists()
    assert "preflight: 2 of 2 nodes fit; neighbours add up" in log
    again = subprocess.run(["bash", "-n", run_dir / "job.sh"])
    assert again.returncode == 0
    rows = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
    assert rows[-1]["status"] == "done"
    assert rows[-1]["step"] == 3


def pretraining(cluster: Cluster, folder: Path, raw: dict[str, Any], *words: str) -> Job:
    """Return a job of two ranks at a configuration; its log lies beside the run folders."""
    file = str(write(folder, raw))
    log = f"--output={folder}/job.out"
    return Job(cluster, Path(raw["run_dir"]), log, "longhaul", "pretrain", file, *words)


def ended(run_dir: Path) -> list[str]:
    lines = (run_dir / "attempts.jsonl").read_text().splitlines()
    return [row["status"] for row in map(json.loads, lines) if "ended" in row]


def warn_once(job: Job, run_dir: Path) -> None:
    """Let the first attempt be stopped after its beginning, and the second run to the end."""
    wait_until((run_dir / "config.yaml").exists, timeout_s=START_S, what="its ranks")
    job.warn()
    job.wait_for_restart(1)
    job.cluster.start_now(job.number)
    job.finish()


def test_a_job_at_a_fork_leaves_the_parent_alone(cluster: Cluster, tmp_path: Path) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    raw = tiny(parent, prepare_shards(tmp_path), train__steps=3, parallel={"cp": 2})
    finish(2, validate(raw))
    before = {path.name for path in parent.iterdir()}
    job = pretraining(cluster, tmp_path, raw, "train.steps=60", "--fork", "child")
    warn_once(job, child)
    assert ended(child) == ["stopped", "done"], (tmp_path / "job.out").read_text()
    assert [row[0] for row in losses(child)] == list(range(1, 61))
    assert {path.name for path in parent.iterdir()} == before


def test_a_job_that_begins_again_does_so_once(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    raw = tiny(run_dir, prepare_shards(tmp_path), train__steps=3, parallel={"cp": 2})
    finish(2, validate(raw))
    (run_dir / "config.yaml").unlink()  # it tells when the new one has begun
    job = pretraining(cluster, tmp_path, raw, "train.steps=60", "--fresh")
    warn_once(job, run_dir)
    assert ended(run_dir) == ["stopped", "done"], (tmp_path / "job.out").read_text()
    assert [row[0] for row in losses(run_dir)] == list(range(1, 61))
    (aside,) = tmp_path.glob("run.2*")
    assert [row[0] for row in losses(aside)] == [1, 2, 3]
    assert (aside / "DONE").exists() and not (aside / "attempts.jsonl").exists()


def test_an_error_of_the_users_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "python", "-c", "raise SystemExit(2)")
    job.finish("FAILED")
    assert cluster.job(job.number)["ExitCode"] == "2:0"  # torchrun's own would be 1
    assert "stop: rank 0 on node1 exited with 2" in job.log or "rank 1 on node2" in job.log


def test_a_run_that_fails_twice_after_the_same_step_stops(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "python", "-c", "raise SystemExit(3)")
    job.wait_for_restart(1)
    cluster.start_now(job.number)
    job.finish("FAILED")
    assert "attempts 1 and 2 both failed after step 0" in job.log
    assert [row["status"] for row in job.ends] == ["failed", "failed"]
