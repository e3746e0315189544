"""The GPU benchmark in toy sizes, on whatever device there is."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.measure import Error, Failed, attempt

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("value", [2e-3, math.nan, math.inf])
def test_an_error_above_its_tolerance_or_no_number_is_wrong(value: float) -> None:
    assert Error(value, 1e-3).wrong
    assert not Error(1e-3, 1e-3).wrong


def test_a_row_that_fails_says_so_and_costs_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> list[str | Error]:
        raise RuntimeError("no such kernel\nat all")

    row = attempt(["fam", "8,192"], fail)
    assert row == ["fam", "8,192", "failed: RuntimeError: no such kernel"]
    assert isinstance(row[-1], Failed)
    assert "in fail" in capsys.readouterr().err
    assert attempt(["fam"], lambda: ["1.0"]) == ["fam", "1.0"]


def test_a_module_that_is_missing_ends_the_part() -> None:
    def fail() -> list[str | Error]:
        raise ModuleNotFoundError("megatron")

    with pytest.raises(ModuleNotFoundError):
        attempt(["fam"], fail)


@pytest.mark.slow
def test_the_toy_sizes_run_and_are_right(tmp_path: Path) -> None:
    parts = ("kernels", "fp8", "memories", "ring")
    words = ["-m", "benchmarks.gpu", "--tiny", "--rounds", "1", "--parts", ",".join(parts)]
    done = subprocess.run(
        [sys.executable, *words, "--output", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for part in parts:
        rows = report.partition(f"## {part}\n")[2].partition("\n## ")[0].splitlines()
        rows = [row for row in rows if row.startswith("| ")][2:]  # behind the header and its line
        assert rows and all("e-" in row for row in rows), report
