"""`--fresh`: the old run is set aside whole, once a job, and the job that asks for it goes on."""

import json
import time
from pathlib import Path

import pytest

from train.cluster.attempts import MAX_IDLE, Verdict, begin, end, ended_attempts
from train.cluster.failure import FOLDER
from train.starting.fresh import MARKER, begin_again, begun_before, set_aside

JOB = "7"


@pytest.fixture(autouse=True)
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    restarts(monkeypatch, 0)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)


def restarts(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))


def old_run(run: Path, step: int = 500) -> Path:
    """Return the folder of a finished run of another job."""
    begin(run, job="1", nodes=["a"], lost=[])
    (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    log(run, step)
    (run / "DONE").touch()
    finish(run, job="1")
    return run


def start(run: Path) -> int:
    return begin(run, job=JOB, nodes=["a", "b"], lost=[])


def finish(run: Path, **changes: object) -> Verdict:
    given = {"code": 0, "stopped_by": "USR1", "cancelled": False, "preflight": None}
    return end(run, **{"job": JOB, **given, **changes})  # type: ignore[arg-type]


def log(run: Path, step: int) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": time.time()}) + "\n")


def rows(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def test_setting_aside_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "NOW")
    run = tmp_path / "run"
    assert set_aside(run) is None
    run.mkdir()
    assert set_aside(run) is None, "nothing is in it"
    for expected in ("run.NOW", "run.NOW-2", "run.NOW-3"):
        run.mkdir(exist_ok=True)
        (run / "file").touch()
        assert set_aside(run) == tmp_path / expected


def test_the_attempt_that_begins_again_can_end_in_the_new_folder(tmp_path: Path) -> None:
    run = old_run(tmp_path / "run")
    assert start(run) == 2
    (run / FOLDER / "fit").write_text("a\nb\n")
    aside = begin_again(run)
    assert aside is not None and (aside / "checkpoints/step-00000500").is_dir()
    assert (run / FOLDER / "fit").read_text() == "a\nb\n"
    log(run, 12)
    assert finish(run).action == "requeue"
    began, ended = rows(run)
    assert (began["attempt"], began["job"], began["from_step"]) == (2, JOB, None)
    assert (ended["attempt"], ended["step"], ended["status"]) == (2, 12, "stopped")


def test_the_old_run_keeps_its_own_attempts_and_that_it_was_done(tmp_path: Path) -> None:
    run = old_run(tmp_path / "run")
    start(run)
    aside = begin_again(run)
    assert aside is not None
    assert [row["attempt"] for row in rows(aside)] == [1, 1]
    assert (aside / "DONE").exists() and not (run / "DONE").exists()
    assert not (run / FOLDER / "DONE").exists()


def test_what_the_old_run_had_reached_is_no_limit_for_the_new_one(tmp_path: Path) -> None:
    run = old_run(tmp_path / "run")
    start(run)
    finish(run, stopped_by=None, preflight="b")  # its ranks never started
    start(run)
    begin_again(run)
    assert finish(run).action == "requeue"
    assert [ended.step for ended in ended_attempts(run, JOB)] == [0]
    for step in range(10, 10 * (MAX_IDLE + 2), 10):
        start(run)
        log(run, step)
        assert finish(run).action == "requeue"


def test_the_jobs_script_stays_where_it_is_submitted_from(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.sh").write_text("#!/bin/sh\n")
    start(run)
    assert begin_again(run) is None, "a new run, in which only the job has written"
    (run / "log.jsonl").touch()
    assert begin_again(run) is not None
    assert (run / "job.sh").read_text() == "#!/bin/sh\n"


def test_a_requeued_job_goes_on_with_what_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert not begun_before(run)
    assert begin_again(run) is None, "there was nothing, but there is from now on"
    restarts(monkeypatch, 1)
    assert begun_before(run)


def test_a_job_requeued_before_its_ranks_began_is_fresh_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = old_run(tmp_path / "run")
    (run / MARKER).write_text('{"job": "1"}')  # the old run began in this way, too
    start(run)
    finish(run, stopped_by=None, preflight="b")
    restarts(monkeypatch, 1)
    assert not begun_before(run)


def test_a_second_command_of_one_allocation_is_fresh_again(tmp_path: Path) -> None:
    begin_again(tmp_path / "run")
    assert not begun_before(tmp_path / "run")


def test_torchrun_starts_its_ranks_again_without_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    begin_again(tmp_path)
    assert not (tmp_path / MARKER).exists()
    assert not begun_before(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begun_before(tmp_path)


def test_without_a_job_an_open_attempt_is_the_old_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    start(run)  # its node lost power
    log(run, 3)
    monkeypatch.delenv("SLURM_JOB_ID")
    aside = begin_again(run)
    assert aside is not None and len(rows(aside)) == 1
    assert not run.exists()
