"""The job scripts on a real SLURM of pretend nodes: accepted, run, stopped, resumed."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import MISSING, Cluster, wait_until

ROOT = Path(__file__).parents[2]
COUNTING_RANKS = str(Path(__file__).with_name("counting_ranks.py"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gloo,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"SLURM is not installed (no {', '.join(MISSING)}): apt-get install"
        " --no-install-recommends slurmd slurmctld slurm-client munge",
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=8) as running:
        running.environment.update(
            GLOO_SOCKET_IFNAME="lo",
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        )
        yield running


def submit(cluster: Cluster, tmp_path: Path, *command: str, **environment: str) -> str:
    output = f"--output={tmp_path}/job.out"
    return cluster.submit(output, f"--chdir={ROOT}", "slurm/smoke.sh", *command, **environment)


def test_slurm_accepts_the_8b_job(cluster: Cluster) -> None:
    answer = cluster.run("sbatch", "--test-only", f"--chdir={ROOT}", "slurm/pretrain_8b.sh")
    assert answer.returncode == 0, answer.stdout
    assert "node[1-8]" in answer.stdout


def test_slurm_refuses_more_nodes_than_there_are(cluster: Cluster) -> None:
    answer = cluster.run("sbatch", "--test-only", "--nodes=9", "slurm/pretrain_8b.sh")
    assert answer.returncode != 0


def test_ranks_of_two_nodes_run_to_the_end(cluster: Cluster, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path, "python", COUNTING_RANKS, str(tmp_path), "3")
    job = cluster.wait_for(number, "COMPLETED", "FAILED", "TIMEOUT", timeout_s=120)
    log = (tmp_path / "job.out").read_text()
    assert job["JobState"] == "COMPLETED", log
    assert all(f"rank {rank} of 4 begins at step 0" in log for rank in range(4)), log
    assert (tmp_path / "DONE").exists()


def test_the_trainer_runs_to_the_end_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    text, shards = tmp_path / "text", tmp_path / "shards"
    text.mkdir()
    for number in range(8):
        (text / f"{number}.txt").write_text(f"The cat sat on mat {number}. " * 400)
    command = ["longhaul", "prepare", str(text), "--output", str(shards)]
    prepared = cluster.run(*command, "--valid-fraction", "0.2", "--workers", "1")
    assert prepared.returncode == 0, prepared.stdout
    number = submit(
        cluster,
        tmp_path,
        *("longhaul", "pretrain", "configs/quickstart.yaml", "train.steps=3"),
        *("train.warmup_steps=1", "train.eval_every=3", f"run_dir={tmp_path}/run"),
        *(f"data.train={shards}/train", f"data.valid={shards}/valid"),
    )
    job = cluster.wait_for(number, "COMPLETED", "FAILED", "TIMEOUT", timeout_s=240)
    log = (tmp_path / "job.out").read_text()
    assert job["JobState"] == "COMPLETED", log
    assert (tmp_path / "run" / "DONE").exists(), log


def test_a_failing_rank_fails_the_job(cluster: Cluster, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path, "python", "-c", "raise SystemExit(3)")
    job = cluster.wait_for(number, "COMPLETED", "FAILED", "TIMEOUT", timeout_s=120)
    log = (tmp_path / "job.out").read_text()
    assert job["JobState"] == "FAILED", log
    assert "exitcode  : 3" in log, log  # the rank's own, and no other mishap


def test_a_warned_job_goes_back_to_the_queue_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    steps = 200
    number = submit(
        cluster,
        tmp_path,
        *("python", COUNTING_RANKS, str(tmp_path), str(steps)),
        RUN_DIR=str(tmp_path),
    )
    wait_until((tmp_path / "step").exists, timeout_s=120, what="the first step")
    cluster.run("scancel", "--signal=USR1", "--batch", number)  # as before the time limit
    wait_until(lambda: cluster.job(number)["Restarts"] == "1", timeout_s=60, what="the requeue")
    stopped_at = int((tmp_path / "step").read_text())
    assert 0 < stopped_at < steps
    cluster.wait_for(number, "PENDING", timeout_s=60)
    # SLURM would hold it for 121 s; but started in the second of its requeue it is refused
    # ("Job credential revoked": the first attempt's, and only the second tells them apart)
    time.sleep(2)
    cluster.run("scontrol", "update", f"jobid={number}", "StartTime=now")

    job = cluster.wait_for(number, "COMPLETED", "FAILED", "TIMEOUT", timeout_s=180)
    log = (tmp_path / "job.out").read_text()
    assert job["JobState"] == "COMPLETED", log
    assert f"rank 0 of 4 begins at step {stopped_at}" in log, log
    assert (tmp_path / "DONE").exists()
