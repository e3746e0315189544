"""`longhaul submit`: what it renders runs by itself, and what cannot work is refused."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.train.runs import ROOT, longhaul
from train.cluster.lead import LeadTime
from train.cluster.submission import Request, render, seconds_of
from train.settings.config import Config, load

FILE = ROOT / "configs" / "pretrain_8b.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(FILE, [f"run_dir={tmp_path}/run"], world_size=64)


def rendered(config: Config, *overrides: str, **request: object) -> str:
    return render(config, FILE, overrides, Request(8, 8)._replace(**request))


def test_it_asks_for_what_the_hand_written_script_asks_for(config: Config) -> None:
    def asked(text: str) -> set[str]:
        return {line for line in text.splitlines() if line.startswith("#SBATCH")}

    by_hand = (ROOT / "slurm" / "pretrain_8b.sh").read_text()
    assert asked(rendered(config)) == asked(by_hand)


def test_bash_and_shellcheck_have_nothing_to_say(config: Config, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(rendered(config, "name=a b'c", container="image.sqsh", spare=1))
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{ROOT}/.venv/bin") or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (`make setup` brings it)")
    answer = subprocess.run([shellcheck, "-x", script], capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stdout


def test_the_signal_and_what_the_script_knows_of_it_agree(config: Config) -> None:
    text = rendered(config, lead_s=420)
    assert "--signal=B:USR1@420\n" in text
    assert "\nLEAD_S=420 " in text


def test_spare_nodes_are_asked_for_and_not_trained_on(config: Config) -> None:
    text = rendered(config, spare=2)
    assert "#SBATCH --nodes=10\n" in text
    assert "\nTRAIN_NODES=8 " in text


def test_a_lead_shorter_than_a_step_and_a_save_took_is_refused(config: Config) -> None:
    config.run_dir.mkdir()
    lead = LeadTime(config.run_dir)
    lead.step(200.0)
    lead.saved(100.0)
    with pytest.raises(ValueError, match="--lead 120 is too short"):
        rendered(config, lead_s=120)
    assert "--signal=B:USR1@660" in rendered(config)  # 1.5 x (200 + 2 x 100 + 30), whole minutes


def test_a_time_limit_must_leave_time_to_train(config: Config) -> None:
    with pytest.raises(ValueError, match="--time 10"):
        rendered(config, time="10")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("1:0:0", 3600), ("2-12", 216000), ("1-0:30", 88200)],
)
def test_time_is_read_as_slurm_writes_it(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


def test_what_is_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="--time 24h"):
        seconds_of("24h")


def test_a_dry_run_prints_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ("submit", "configs/pretrain_8b.yaml", f"run_dir={run_dir}", "--nodes", 8)
    answer = longhaul(*command, "--dry-run")
    assert answer.returncode == 0, answer.stderr
    assert "#SBATCH --nodes=8" in answer.stdout
    assert not run_dir.exists()


def test_a_configuration_that_does_not_fit_the_nodes_is_refused() -> None:
    answer = longhaul("submit", "configs/pretrain_8b.yaml", "--nodes", 3, "--dry-run")
    assert answer.returncode == 2
    assert "train.batch_size: 32 is not a multiple" in answer.stderr


def test_the_plan_is_printed_beside_the_script_and_what_does_not_fit_is_refused() -> None:
    command = ("submit", str(FILE), "--nodes", "8", "--dry-run", "--gpu", "h100")
    fits = longhaul(*command)
    assert fits.returncode == 0 and "fits:" in fits.stderr
    assert fits.stdout.startswith("#!/usr/bin/env bash\n") and "fits:" not in fits.stdout
    large = longhaul(*command, "train.micro_batch=4", "train.checkpointing=none")
    assert large.returncode == 2 and "the run does not fit on 8 nodes of 8 (h100)" in large.stderr
    assert large.stdout == ""
