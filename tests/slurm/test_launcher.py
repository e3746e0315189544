"""What torchrun loses: the exit code of the rank that failed first, and what it said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import ROOT
from train.cluster.failure import first_failure, tell_launcher

pytestmark = pytest.mark.gloo


@pytest.mark.parametrize(
    ("ends", "code", "exits"), [("exit 7", 7, 7), ("kill -9 $BASHPID", -9, 137)]
)
def test_the_first_failed_ranks_code_is_the_launchers(
    ends: str, code: int, exits: int, tmp_path: Path
) -> None:
    torchrun = ["--standalone", "--nproc-per-node=2", "--no-python"]
    rank = ["bash", "-c", f'if [ "$RANK" = 1 ]; then {ends}; else exec sleep 60; fi']
    ended = subprocess.run(
        [sys.executable, "-m", "train.cluster.launcher", *torchrun, *rank],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ATTEMPT_FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == exits, ended.stderr
    failure = first_failure(tmp_path)
    assert failure is not None
    assert (failure.rank, failure.code) == (1, code)


def test_a_ranks_error_is_what_torchrun_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    tell_launcher(ValueError("train.lr=-1 is negative"))
    read = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    assert read.message["message"] == "ValueError: train.lr=-1 is negative"  # type: ignore[index]
    assert read.timestamp > 0
