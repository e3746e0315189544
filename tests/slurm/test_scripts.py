"""The job scripts, without a cluster: they parse, and they agree with the configurations."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = [ROOT / "slurm" / "pretrain_8b.sh", ROOT / "slurm" / "smoke.sh"]
SHELL_FILES = [*JOBS, ROOT / "slurm" / "lib.sh", ROOT / ".ci" / "run"]


def sbatch_options(script: Path) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE)
    return dict(lines)


@pytest.mark.parametrize("script", SHELL_FILES, ids=lambda path: path.name)
def test_bash_parses_it(script: Path) -> None:
    # sbatch itself accepts a script with a syntax error
    answer = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("script", SHELL_FILES, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{ROOT}/.venv/bin") or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (`make setup` brings it)")
    answer = subprocess.run([shellcheck, "-x", script], capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_every_sbatch_line_is_read(script: Path) -> None:
    text = script.read_text()
    body = text.index("\ntrap ")
    # sbatch stops reading its lines at the first command, silently
    assert text.count("\n#SBATCH ") == len(sbatch_options(script))
    assert text.rindex("\n#SBATCH ") < body


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_what_a_script_knows_of_its_warning_is_what_it_asks_for(script: Path) -> None:
    known = re.search(r"^LEAD_S=\$\{LEAD_S:-(\d+)\}", script.read_text(), re.M)
    assert known is not None
    assert sbatch_options(script)["signal"] == f"B:USR1@{known[1]}"


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_a_signal_is_taken_from_the_first_command_on(script: Path) -> None:
    commands = [line for line in script.read_text().splitlines() if line and line[0] != "#"]
    assert commands[0].startswith("trap 'EARLY=USR1' USR1")


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_a_job_survives_its_time_limit(script: Path) -> None:
    options = sbatch_options(script)
    assert "requeue" in options
    assert options["signal"].startswith("B:USR1@")  # to the shell alone, early
    assert options["open-mode"] == "append"  # a restart must not cut the log
    assert options["ntasks-per-node"] == "1"  # torchrun starts the ranks


def test_the_8b_script_starts_the_configured_number_of_ranks() -> None:
    config = pytest.importorskip("train.settings.config").load(
        ROOT / "configs" / "pretrain_8b.yaml"
    )
    script = ROOT / "slurm" / "pretrain_8b.sh"
    options = sbatch_options(script)
    text = script.read_text()
    launched = re.search(r'^run_until_done (\d+) .* run_dir="\$RUN_DIR"', text, re.M)
    default = re.search(r"^RUN_DIR=\$\{RUN_DIR:-(\S+)\}", text, re.M)
    assert launched is not None
    assert default is not None
    assert Path(default[1]) == config.run_dir
    assert launched[1] == options["gpus-per-node"]
    world = int(options["nodes"]) * int(launched[1])
    assert world == 64
    assert world % (config.parallel.tp * config.parallel.cp) == 0
    assert config.parallel.tp * config.parallel.cp == int(options["gpus-per-node"])
