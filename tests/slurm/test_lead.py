"""The warning before the time limit: long enough, or said to be too short."""

from pathlib import Path

import pytest

from train.cluster.lead import DEFAULT_S, LeadTime, advise, lead_for, read_timing


def measured(run_dir: Path, *, step_s: float, save_s: float) -> LeadTime:
    lead = LeadTime(run_dir)
    lead.step(step_s)
    lead.saved(save_s)
    return lead


def test_nothing_measured_is_no_reason_to_warn(tmp_path: Path) -> None:
    assert lead_for(tmp_path) == DEFAULT_S
    assert advise(tmp_path, 1.0) is None


def test_a_step_a_save_under_way_and_a_save_must_fit(tmp_path: Path) -> None:
    measured(tmp_path, step_s=100.0, save_s=50.0)
    assert advise(tmp_path, 200.0 + 30.0) is None
    advice = advise(tmp_path, 229.0)
    assert advice is not None
    assert f"--signal=B:USR1@{lead_for(tmp_path)}" in advice


def test_what_is_asked_for_has_room_and_is_whole_minutes(tmp_path: Path) -> None:
    measured(tmp_path, step_s=100.0, save_s=50.0)
    assert lead_for(tmp_path) % 60 == 0
    assert 230 < lead_for(tmp_path) <= 2 * 230


def test_the_longest_of_all_attempts_counts(tmp_path: Path) -> None:
    measured(tmp_path, step_s=9.0, save_s=1.0)
    measured(tmp_path, step_s=2.0, save_s=5.0)
    timing = read_timing(tmp_path)
    assert timing is not None
    assert (timing.step_s, timing.save_s) == (9.0, 5.0)


def test_training_says_once_that_the_warning_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEAD_S", "60")
    lead = LeadTime(tmp_path)
    lead.step(300.0)
    assert "too short" in (lead.saved(10.0) or "")
    assert lead.saved(10.0) is None
