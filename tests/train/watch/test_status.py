"""`longhaul status`: where a run stands, from its files alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.runs import longhaul, small
from train.tracking.rows import read_rows
from train.tracking.timeline import Timeline, read_events
from train.watch.status import describe, read_standing

NOW = 1_000_000.0


def write_run(folder: Path, *, steps: int = 30, step_s: float = 2.0) -> Path:
    """Write a run of 100 steps that did some of them, the last just now."""
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(small(name="books")))
    began = NOW - steps * step_s
    rows = [
        {"step": step, "loss": 5.0 - step / 10, "grad_norm": 1.0, "lr": 0.1, "tokens_per_s": 1024.0}
        | {"mfu": 0.4, "time": began + step * step_s}
        for step in range(1, steps + 1)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    add(run, "started", 0, began, attempt=1, nodes=["n1", "n2"], job="77")
    return run


def add(run: Path, kind: str, step: int, when: float, text: str = "", **facts: Any) -> None:
    event = {"time": when, "kind": kind, "step": step, "text": text or kind, **facts}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


def shown(run: Path, now: float = NOW) -> str:
    return "\n".join(describe(read_standing(run, now), now))


def test_a_running_run_shows_its_step_speed_and_time_left(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    standing = read_standing(run, NOW + 3)
    assert (standing.state, standing.step, standing.steps) == ("running", 30, 100)
    assert standing.eta_s == pytest.approx(70 * 2.0)
    assert standing.loss == pytest.approx(2.0)
    text = shown(run, NOW + 3)
    assert "step 30 of 100 (30%), 61.4k tokens" in text  # 30 x 8 lanes x 256
    assert "1.02k tokens/s, MFU 40%" in text and "2m20s" in text and "last step   3s ago" in text
    assert "checkpoint  none" in text
    assert "1, job 77, on n1 n2, from step 0" in text


def test_a_run_that_is_silent_for_ten_steps_does_not_count_as_running(tmp_path: Path) -> None:
    run = write_run(tmp_path, step_s=60.0)
    assert read_standing(run, NOW + 590).state == "running"
    silent = read_standing(run, NOW + 610)
    assert silent.state == "silent" and silent.eta_s is None
    assert "squeue" in shown(run, NOW + 610)


@pytest.mark.parametrize(
    ("kind", "state", "advice"),
    [
        ("failed", "failed", "mend what it says"),
        ("hang", "hung", "start the same command again"),
        ("preempted", "stopped", "start the same command again"),
    ],
)
def test_the_end_of_a_run_is_its_state_with_reason_and_advice(
    kind: str, state: str, advice: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path)
    add(run, kind, 30, NOW, "because of it")
    standing = read_standing(run, NOW + 9999)
    assert (standing.state, standing.reason) == (state, "because of it")
    assert advice in shown(run)
    add(run, "started", 30, NOW + 1)
    assert read_standing(run, NOW + 2).state == "not begun"  # the next attempt


def test_done_is_finished_whatever_came_before(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    add(run, "failed", 30, NOW)
    add(run, "started", 30, NOW)
    add(run, "finished", 100, NOW)
    (run / "DONE").write_text("100\n")
    assert read_standing(run, NOW + 9999).state == "finished"
    add(run, "failed", 0, NOW)  # asked for more steps, and failed before it began
    assert read_standing(run, NOW).state == "failed"


def test_the_speed_is_that_of_this_attempt(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    add(
        run, "started", 20, NOW - 19.0, attempt=2
    )  # after step 20, with the job in the queue before
    standing = read_standing(run, NOW)
    assert standing.step_s == pytest.approx(2.0)
    assert [attempt.number for attempt in standing.attempts] == [1, 2]


def test_what_the_job_script_wrote_of_attempts_is_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    rows: list[dict[str, Any]] = [
        {"attempt": 1, "job": "5", "nodes": ["a", "b"], "started": "2026-11-21T10:00:00+00:00"}
        | {"from_step": None},
        {"attempt": 1, "ended": "2026-11-21T11:00:00+00:00", "step": 20, "status": "stopped"}
        | {"reason": "time limit"},
        {"attempt": 2, "job": "5", "nodes": ["a", "c"], "started": "2026-11-21T11:05:00+00:00"}
        | {"from_step": 20},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "attempts.jsonl").write_text(text + '{"attempt": 3, "jo')  # being written
    one, two = read_standing(run, NOW).attempts
    assert (one.nodes, one.status, one.reason, one.step) == (
        ["a", "b"],
        "stopped",
        "time limit",
        20,
    )
    assert one.ended is not None and one.started is not None and one.ended - one.started == 3600
    assert (two.from_step, two.status) == (20, None)
    assert "1, job 5, on a b, from step 0, to 20, for 1h00m, stopped: time limit" in shown(run)


def test_only_the_first_line_of_a_long_event_is_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    add(run, "straggler", 30, NOW, "rank 3 is slow\nand more")
    assert "rank 3 is slow" in shown(run) and "and more" not in shown(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    done = longhaul("status", tmp_path)
    assert done.returncode == 2 and "is no run's folder" in done.stderr


def test_the_command_prints_it_for_people_and_programs_without_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "DONE").write_text("100\n")
    code = "import sys; sys.modules['torch'] = None; from train.cli import main; main()"
    for words in ((), ("--watch",)):
        done = longhaul("status", run, *words, code=code)
        assert done.returncode == 0, done.stderr
        assert "state       finished" in done.stdout and "books" in done.stdout
    values = json.loads(longhaul("status", run, "--json", code=code).stdout)
    assert values["step"] == 30 and values["attempts"][0]["nodes"] == ["n1", "n2"]


def test_torn_rows_are_passed_over_and_a_tail_begins_with_a_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"\n{"a": 3}\n[4]\n')
    assert read_rows(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert read_rows(path, tail_bytes=len('1}\n{"a": 2}\n{"a"\n{"a": 3}\n[4]\n')) == [
        {"a": 2},
        {"a": 3},
    ]
    assert read_rows(tmp_path / "none") == []


def test_a_failure_before_the_start_is_not_taken_for_the_last_attempts(tmp_path: Path) -> None:
    first = Timeline(tmp_path, writes=True)
    first.add("started", 0, "started")
    first.add("failed", 3, "failed")
    other = Timeline(tmp_path, writes=False)  # of the next attempt
    for _ in range(2):
        other.add("failed", 0, "failed before it began", must=True)
    assert [event["step"] for event in read_events(tmp_path)] == [0, 3, 0]


def test_other_ranks_write_an_event_only_where_none_of_its_kind_is(tmp_path: Path) -> None:
    first, other = (Timeline(tmp_path, writes=writes) for writes in (True, False))
    first.add("started", 0, "started")
    other.add("saved", 1, "saved")
    for _ in range(2):
        other.add("hang", 1, "hung", must=True)
    first, other = (Timeline(tmp_path, writes=writes) for writes in (True, False))
    first.add("started", 1, "again")
    other.add("hang", 2, "hung again", must=True)
    kinds = [event["kind"] for event in read_events(tmp_path)]
    assert kinds == ["started", "hang", "started", "hang"]
