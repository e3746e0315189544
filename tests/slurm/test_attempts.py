"""Whether a job goes on: what its attempts came to decides, and says why."""

import json
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest

from train.cluster.attempts import (
    ATTEMPTS,
    MAX_FAILED,
    MAX_IDLE,
    Ended,
    Status,
    Verdict,
    begin,
    end,
    ended_attempts,
    judge,
)
from train.cluster.failure import FOLDER, HUNG, REFUSED, Failure, write_failure
from train.cluster.job import went_down


def history(*steps: int, status: Status = "failed", nodes: str = "") -> list[Ended]:
    return [
        Ended(number, "1", step, status, "why", node.strip() or None)
        for number, (step, node) in enumerate(zip(steps, nodes.ljust(len(steps)), strict=True), 1)
    ]


def start(run_dir: Path, lost: tuple[str, ...] = ()) -> int:
    return begin(run_dir, job="1", nodes=["a", "b"], lost=lost)


def finish(run_dir: Path, code: int = 1, **changes: object) -> Verdict:
    given: dict[str, object] = {"stopped_by": None, "cancelled": False, "preflight": None}
    return end(run_dir, **{"job": "1", "code": code, **given, **changes})  # type: ignore[arg-type]


def log(run_dir: Path, step: int) -> None:
    with (run_dir / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": time.time()}) + "\n")


def rows(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / ATTEMPTS).read_text().splitlines()]


def test_a_first_failure_is_tried_again() -> None:
    assert judge(history(10)).action == "requeue"


def test_two_failures_after_the_same_step_are_no_chance() -> None:
    verdict = judge(history(10, 40, 40))
    assert verdict.action == "stop"
    assert "attempts 2 and 3 both failed after step 40" in verdict.reason


def test_failures_go_on_while_each_gets_further() -> None:
    assert judge(history(*range(1, 50))).action == "requeue"


def test_failures_that_get_no_further_than_the_best_stop() -> None:
    steps = [40, *range(30, 30 - MAX_FAILED, -1)]
    assert judge(history(*steps[:-1])).action == "requeue"
    assert judge(history(*steps)).action == "stop"


def test_being_preempted_again_and_again_is_borne_longer() -> None:
    stopped = history(*[7] * (MAX_IDLE + 1), status="stopped")
    assert judge(stopped[:-1]).action == "requeue"
    assert "got no further than step 7" in judge(stopped).reason


def test_a_node_on_which_two_failures_began_is_left_out() -> None:
    assert judge(history(10, 20, 30, nodes="aba")).exclude == ("a",)
    assert judge(history(10, 20, nodes="ab")).exclude == ()


def test_an_attempt_is_a_line_at_its_beginning_and_a_line_at_its_end(tmp_path: Path) -> None:
    assert start(tmp_path) == 1
    log(tmp_path, 12)
    write_failure(tmp_path / FOLDER, Failure("b", 3, -9, time.time(), ""))
    verdict = finish(tmp_path, 137)
    began, ended = rows(tmp_path)
    assert began | {"started": 0} == {
        "attempt": 1,
        "job": "1",
        "nodes": ["a", "b"],
        "started": 0,
        "from_step": None,
    }
    assert (ended["step"], ended["status"], ended["node"]) == (12, "failed", "b")
    assert "rank 3 on b was ended by SIGKILL" in str(ended["reason"])
    assert verdict.action == "requeue"


def test_a_rank_that_lost_another_does_not_blame_its_own_node(tmp_path: Path) -> None:
    start(tmp_path)
    text = "RuntimeError: Connection closed by peer [127.0.0.1]:4711"
    write_failure(tmp_path / FOLDER, Failure("a", 0, 1, 5.0, text))
    finish(tmp_path)
    assert rows(tmp_path)[-1]["node"] is None
    start(tmp_path)
    write_failure(tmp_path / FOLDER, Failure("a", 0, 1, 5.0, text))
    finish(tmp_path, lost=["b"])  # SLURM knows better
    assert rows(tmp_path)[-1]["node"] == "b"


def test_slurm_says_which_nodes_went_down() -> None:
    nodes = (
        "NodeName=a State=ALLOCATED SlurmdStartTime=2026-11-21T16:00:00\n"
        "NodeName=b State=DOWN* SlurmdStartTime=2026-11-21T16:00:00\n"
        "NodeName=c State=IDLE SlurmdStartTime=2026-11-21T17:30:00\n"
        "NodeName=d State=IDLE SlurmdStartTime=None\n"
    )
    since = datetime.fromisoformat("2026-11-21T17:00:00").astimezone()
    assert went_down(nodes, since) == ["b", "c"]


def test_a_step_of_an_earlier_attempt_is_not_this_ones(tmp_path: Path) -> None:
    tmp_path.joinpath("checkpoints/step-00000010").mkdir(parents=True)
    log(tmp_path, 14)
    time.sleep(0.01)
    start(tmp_path)
    finish(tmp_path)
    assert rows(tmp_path)[-1]["step"] == 10


def test_a_failure_that_a_signal_caused_comes_before_those_that_follow(tmp_path: Path) -> None:
    start(tmp_path)
    write_failure(tmp_path / FOLDER, Failure("a", 0, 1, 5.0, "Connection closed by peer"))
    write_failure(tmp_path / FOLDER, Failure("b", 1, -9, 6.0, ""))
    finish(tmp_path)
    assert rows(tmp_path)[-1]["node"] == "b"


def test_what_the_user_must_change_is_not_tried_again(tmp_path: Path) -> None:
    start(tmp_path)
    write_failure(tmp_path / FOLDER, Failure("a", 0, REFUSED, 5.0, "ConfigError: no such corpus"))
    verdict = finish(tmp_path, REFUSED)
    assert verdict.action == "stop"
    assert "no such corpus" in verdict.reason


def test_done_is_done(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / "DONE").touch()
    assert finish(tmp_path, 0).action == "done"
    assert start(tmp_path) == 2
    assert not (tmp_path / "DONE").exists()


def test_ranks_that_end_well_without_done_have_not_finished(tmp_path: Path) -> None:
    start(tmp_path)
    log(tmp_path, 12)
    verdict = finish(tmp_path, 0)
    assert verdict.action == "requeue"
    ended = rows(tmp_path)[-1]
    assert (ended["status"], ended["step"]) == ("stopped", 12)
    assert "the ranks exited with 0 and wrote no DONE" in str(ended["reason"])


def test_ending_well_without_done_is_not_repeated_for_ever(tmp_path: Path) -> None:
    actions = []
    for _ in range(MAX_IDLE + 1):
        start(tmp_path)
        actions.append(finish(tmp_path, 0).action)
    assert actions == ["requeue"] * MAX_IDLE + ["stop"]


def test_a_command_that_writes_no_done_is_finished_by_its_exit_code(tmp_path: Path) -> None:
    start(tmp_path)
    assert finish(tmp_path, 0, writes_done=False).action == "done"
    start(tmp_path)
    assert finish(tmp_path, 0, writes_done=False, stopped_by="USR1").action == "requeue"
    start(tmp_path)
    assert finish(tmp_path, 1, writes_done=False).action == "requeue"


def test_an_attempt_that_is_no_longer_written_down_ends_the_job(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / ATTEMPTS).unlink()
    verdict = finish(tmp_path, 0, stopped_by="USR1")
    assert verdict.action == "stop"
    assert "has no open attempt of this job" in verdict.reason
    assert "submit again" in verdict.reason
    (tmp_path / "DONE").touch()
    assert finish(tmp_path, 0).action == "done"


def test_a_job_does_not_end_what_another_began(tmp_path: Path) -> None:
    start(tmp_path)
    assert finish(tmp_path, 1, job="2").action == "stop"
    assert len(rows(tmp_path)) == 1
    assert finish(tmp_path, 1).action == "requeue"


def test_a_stop_goes_back_to_the_queue_unless_somebody_cancelled(tmp_path: Path) -> None:
    start(tmp_path)
    assert finish(tmp_path, 0, stopped_by="USR1").action == "requeue"
    start(tmp_path)
    assert finish(tmp_path, 0, stopped_by="TERM", cancelled=True).action == "stop"


def test_a_stop_that_only_the_ranks_heard_goes_back_to_the_queue(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / FOLDER / "stopped").write_text("SIGTERM")
    assert finish(tmp_path, 0).action == "requeue"
    assert rows(tmp_path)[-1]["status"] == "stopped"


@pytest.mark.parametrize(("lost", "status"), [((), "stopped"), (("b",), "failed")])
def test_the_next_attempt_ends_one_that_could_not(
    tmp_path: Path, lost: tuple[str, ...], status: Status
) -> None:
    start(tmp_path)
    log(tmp_path, 3)
    assert start(tmp_path, lost) == 2
    (ended,) = ended_attempts(tmp_path, "1")
    assert (ended.attempt, ended.step, ended.status) == (1, 3, status)
    assert ended.node == (lost[0] if lost else None)


def test_unfit_nodes_are_left_out_at_once_and_are_no_failure_of_a_step(tmp_path: Path) -> None:
    for _ in range(2):
        start(tmp_path)
        verdict = finish(tmp_path, 0, preflight="a,b")
        assert verdict.action == "requeue"
        assert verdict.exclude == ("a", "b")


def test_a_line_cut_short_by_a_crash_costs_nothing_else(tmp_path: Path) -> None:
    start(tmp_path)
    with (tmp_path / ATTEMPTS).open("a") as file:
        file.write('{"attempt": 1, "end')
    assert start(tmp_path) == 2
    finish(tmp_path)
    assert [ended.attempt for ended in ended_attempts(tmp_path, "1")] == [1, 2]


def test_a_hang_is_told_and_blames_no_node(tmp_path: Path) -> None:
    start(tmp_path)
    write_failure(tmp_path / FOLDER, Failure("a", 1, HUNG, 5.0, ""))
    assert finish(tmp_path).action == "requeue"
    end_row = rows(tmp_path)[-1]
    assert end_row["reason"] == "the job hung; the log says where (rank 1 on a ended itself)"
    assert end_row.get("node") is None


@pytest.mark.parametrize("code", [-signal.SIGABRT, -signal.SIGTERM, HUNG])
def test_an_error_is_not_hidden_by_those_it_ended_later(tmp_path: Path, code: int) -> None:
    start(tmp_path)
    write_failure(tmp_path / FOLDER, Failure("a", 0, 1, 100.0, "OutOfMemoryError: 80 GiB"))
    write_failure(tmp_path / FOLDER, Failure("b", 8, code, 90.0, ""))
    finish(tmp_path)
    assert rows(tmp_path)[-1]["node"] == "a"
    assert "OutOfMemoryError" in str(rows(tmp_path)[-1]["reason"])
