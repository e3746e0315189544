"""Jobs of the tests: submitted through slurm/smoke.sh, watched through files."""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil

from tests.slurm.cluster import Cluster, wait_until

ROOT = Path(__file__).parents[2]
COUNTING_RANKS = str(Path(__file__).with_name("counting_ranks.py"))
HELD_RANKS = str(Path(__file__).with_name("held_ranks.py"))
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
START_S = 180
"""For an attempt to reach its first step, on a machine with much else to do."""


class Job:
    """A job of the smoke script whose run folder is `folder`."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *words: str,
        ranks: int = 1,
        preflight: str = "no",
        **environment: str,
    ) -> None:
        """words: options of sbatch, beginning with --; then the ranks' command.

        The ranks get five minutes to stop, where the machine has much else to do.
        """
        self.cluster, self.folder = cluster, folder
        options = list(takewhile(lambda word: word.startswith("--"), words))
        self.number = cluster.submit(
            f"--output={folder}/job.out",
            f"--chdir={ROOT}",
            *options,
            "slurm/smoke.sh",
            *words[len(options) :],
            RUN_DIR=str(folder),
            RANKS=str(ranks),
            PREFLIGHT=preflight,
            **{"LEAD_S": "300", **environment},
        )

    @property
    def log(self) -> str:
        """What the job printed."""
        return (self.folder / "job.out").read_text(errors="replace")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The lines of attempts.jsonl."""
        text = (self.folder / "attempts.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    @property
    def ends(self) -> list[dict[str, Any]]:
        """Its lines that end an attempt."""
        return [row for row in self.rows if "ended" in row]

    def wait_for_file(self, name: str) -> None:
        """Return once the run folder has the file; fail if the job ends before."""
        path = self.folder / name
        wait_until(lambda: path.exists() or self.state in ENDED, timeout_s=START_S, what=name)
        assert path.exists(), self.log

    @property
    def state(self) -> str:
        """SLURM's word for it."""
        return self.cluster.job(self.number)["JobState"]

    def warn(self) -> None:
        """Signal the script as SLURM does before the time limit."""
        self.cluster.run("scancel", "--signal=USR1", "--batch", self.number)

    def wait_for_restart(self, number: int, *, timeout_s: float = 120) -> None:
        """Return once SLURM has requeued the job so often."""
        wait_until(
            lambda: self.cluster.job(self.number)["Restarts"] == str(number),
            timeout_s=timeout_s,
            what=f"restart {number}",
        )

    def finish(self, state: str = "COMPLETED", *, timeout_s: float = 300) -> None:
        """Return when the job has ended; fail unless in this state."""
        found = self.cluster.wait_for(self.number, *ENDED, timeout_s=timeout_s)["JobState"]
        assert found == state, self.log

    def rank(self, rank: int) -> psutil.Process:
        """Return a rank's process."""
        for process in psutil.process_iter(["cmdline"]):
            try:
                words = process.info["cmdline"] or []
                mine = str(self.folder) in words and process.environ().get("RANK") == str(rank)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if mine and words[0].endswith("python"):
                return process
        raise AssertionError(f"no rank {rank} runs: {self.log}")


def wait_for_step(folder: Path, step: int) -> None:
    """Return once the counting ranks are so far."""

    def reached() -> bool:
        text = (folder / "step").read_text() if (folder / "step").exists() else ""
        return bool(text) and int(text) >= step

    wait_until(reached, timeout_s=START_S, what=f"step {step}")
