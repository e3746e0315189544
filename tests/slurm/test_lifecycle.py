"""What a cluster does to a job, done to it: warned in every phase, preempted, killed, cut off."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import COUNTING_RANKS, HELD_RANKS, ROOT, Job, wait_for_step
from tests.train.attempts import finish, losses
from tests.train.runs import write
from tests.train.tiny import prepare_shards, tiny
from train.reading.verify import verify
from train.settings.config import validate

pytestmark = [pytest.mark.slow, pytest.mark.gloo, pytest.mark.slurm]

PHASES = ("import", "build", "step", "save", "evaluation", "data")
MANY = "100000"
"""Steps of counting ranks that are not meant to finish by themselves."""


def counting(cluster: Cluster, folder: Path, *options: str) -> Job:
    return Job(cluster, folder, *options, "python", COUNTING_RANKS, str(folder), MANY)


def let_finish(job: Job) -> None:
    """Make the counting ranks' next attempt their last one."""
    (job.folder / "step").write_text(str(int(MANY) - 3))
    job.cluster.start_now(job.number)
    job.finish()


def test_a_run_warned_in_every_phase_is_the_run_that_nobody_disturbed(
    cluster: Cluster, tmp_path: Path
) -> None:
    shards = prepare_shards(tmp_path)
    changes = {"train__steps": 36, "checkpoint__every": 6, "train__eval_every": 9}
    changed = {**changes, "parallel": {"cp": 2}, "data__workers": 1}
    alone, disturbed = tmp_path / "alone", tmp_path / "disturbed"
    disturbed.mkdir()
    raw = tiny(disturbed, shards, **changed, tracking__enabled=True)
    file = str(write(tmp_path, raw))
    job = Job(cluster, disturbed, "python", HELD_RANKS, file, ",".join(PHASES))
    for number, phase in enumerate(PHASES, 1):
        job.wait_for_file(f"in-{phase}")
        job.warn()
        job.wait_for_restart(number)
        cluster.start_now(job.number)
    job.finish()

    assert [row["status"] for row in job.ends] == ["stopped"] * len(PHASES) + ["done"], job.log
    finish(2, validate(tiny(alone, shards, **changed)))
    assert losses(disturbed) == losses(alone)
    found = verify([disturbed, alone])
    assert found.good, found.sentences
    evaluated = {
        line.split("|")[0].split()[-1] for line in job.log.splitlines() if "valid/loss" in line
    }
    assert evaluated >= {"9", "18", "27", "36"}  # also where the warning cut one short
    sessions = {
        json.loads(line)["values"]["session"]
        for line in (disturbed / "tracking/spool.jsonl").read_text().splitlines()
        if line and json.loads(line)["kind"] == "status"
    }
    assert len(sessions) > 1
    assert len((disturbed / "tracking/run_id").read_text().split()) == 1  # one MLflow run


def test_a_time_limit_is_met_by_a_save_and_a_requeue(cluster: Cluster, tmp_path: Path) -> None:
    job = counting(cluster, tmp_path, "--time=2", "--signal=B:USR1@60")
    job.wait_for_restart(1, timeout_s=240)
    (ended,) = job.ends
    assert (ended["status"], ended["reason"]) == ("stopped", "USR1")
    let_finish(job)


def test_a_preempted_job_saves_gives_way_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    job = counting(cluster, tmp_path)
    wait_for_step(tmp_path, 5)
    urgent = cluster.submit(
        "--partition=urgent", "--nodes=8", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    )
    job.wait_for_restart(1)
    cluster.wait_for(urgent, "COMPLETED", timeout_s=120)
    assert [row["status"] for row in job.ends] == ["stopped"], job.log
    let_finish(job)
    assert job.ends[-1]["status"] == "done"


def test_a_second_job_in_the_folder_is_refused_and_the_first_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = counting(cluster, tmp_path)
    wait_for_step(tmp_path, 5)
    second = cluster.submit(
        *(f"--output={tmp_path}/second.out", f"--chdir={ROOT}", "slurm/smoke.sh", "true"),
        RUN_DIR=str(tmp_path),
        PREFLIGHT="no",
    )
    cluster.wait_for(second, "FAILED", timeout_s=120)
    said = (tmp_path / "second.out").read_text()
    assert f"job {job.number} has an attempt in {tmp_path} and still has nodes" in said
    job.warn()
    job.wait_for_restart(1)
    assert [(row["status"], row["reason"]) for row in job.ends] == [("stopped", "USR1")]
    let_finish(job)


def test_a_killed_rank_is_named_and_the_job_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    job = counting(cluster, tmp_path)
    wait_for_step(tmp_path, 5)
    job.rank(1).send_signal(signal.SIGKILL)
    job.wait_for_restart(1)
    (ended,) = job.ends
    assert ended["status"] == "failed"
    assert "rank 1 on node2 was ended by SIGKILL" in ended["reason"]
    assert ended["node"] == "node2"
    let_finish(job)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    job = counting(cluster, tmp_path)
    wait_for_step(tmp_path, 5)
    cluster.run("scancel", job.number)
    job.finish("CANCELLED")
    assert cluster.job(job.number)["Restarts"] == "0"
    assert "stops at step" in job.log


def test_a_node_on_which_ranks_die_twice_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    job = counting(cluster, tmp_path)
    for number in (1, 2):
        wait_for_step(tmp_path, 20 * number)
        job.rank(1).send_signal(signal.SIGKILL)
        job.wait_for_restart(number)
        if number == 1:
            cluster.start_now(job.number)
    left_out = job.ends[-1]["node"]
    assert job.ends[0]["node"] == left_out
    wait_until(
        lambda: cluster.job(job.number)["ExcNodeList"] == left_out, timeout_s=20, what="exclusion"
    )
    let_finish(job)
    assert left_out not in job.rows[-2]["nodes"]


def sick_node(folder: Path, node: str) -> str:
    """Return a PATH on which one node's GPU driver fails and the others' is well."""
    programs = folder / "programs"
    programs.mkdir()
    driver = programs / "nvidia-smi"
    driver.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" = {node} ] && echo Xid 79 && exit 9\n'
        "echo 0, 0, Not Active, Not Active\n"
    )
    driver.chmod(0o755)
    return f"{programs}:"


def test_an_unfit_node_is_left_out_where_enough_remain(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(
        cluster,
        tmp_path,
        *("--nodes=3", "python", COUNTING_RANKS, str(tmp_path), "3"),
        preflight="yes",
        TRAIN_NODES="2",
        PATH=sick_node(tmp_path, "node1") + cluster.environment["PATH"],
    )
    job.finish()
    assert "preflight: node1 is unfit: nvidia-smi failed with 9: Xid 79" in job.log
    assert "2 of 3 nodes fit" in job.log
    assert "rank 1 of 2 begins" in job.log


def test_without_enough_fit_nodes_others_are_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(
        cluster,
        tmp_path,
        *("python", COUNTING_RANKS, str(tmp_path), "3"),
        preflight="yes",
        PATH=sick_node(tmp_path, "node1") + cluster.environment["PATH"],
    )
    job.wait_for_restart(1)
    assert "preflight: node1 not fit" in job.ends[0]["reason"]
    cluster.start_now(job.number)
    job.finish()
    assert "node1" not in job.rows[-2]["nodes"]


@pytest.mark.parametrize("away_s", [3, 40], ids=["returns", "is gone"])
def test_a_node_that_loses_power_is_named_and_the_job_goes_on(
    cluster: Cluster, tmp_path: Path, away_s: float
) -> None:
    if not cluster.separate:
        pytest.skip("nodes are no namespaces here (not root): their power cannot be cut")
    job = counting(cluster, tmp_path)
    wait_for_step(tmp_path, 5)
    lost = job.rows[0]["nodes"][1]
    cluster.cut_power(lost)
    time.sleep(away_s)
    cluster.power_on(lost)
    job.wait_for_restart(1, timeout_s=180)
    # not started at once: SLURM may still end what it believes to run there
    wait_until(lambda: len(job.rows) > 2, timeout_s=300, what="the second attempt")
    (tmp_path / "step").write_text(str(int(MANY) - 3))
    job.finish()
    first = job.ends[0]
    assert (first["status"], first["node"]) == ("failed", lost), job.log
    assert job.ends[-1]["status"] == "done"
