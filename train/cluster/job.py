"""What slurm/lib.sh asks between the ranks' launches: `python -m train.cluster.job WORD RUN_DIR`.

begin: an attempt begins; prints its number. Refused while another job trains in the folder.
end: it has ended; prints `done`, `stop` or `requeue`, and after it the nodes to leave out from now
on. Reasons go to stderr, into the job's log.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from train.cluster.attempts import begin, end, open_attempt
from train.cluster.lead import advise


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m train.cluster.job")
    parser.add_argument("word", choices=("begin", "end"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--nodes", default="", help="those of the job, with commas")
    parser.add_argument("--running", default="", help="jobs that have nodes now, with commas")
    parser.add_argument("--lead", type=float, help="seconds between the signal and the limit")
    parser.add_argument("--code", type=int, default=0, help="what the ranks ended with")
    parser.add_argument("--stopped-by", default="", help="the signal that the script heard")
    parser.add_argument("--cancelled", action="store_true", help="by somebody, for good")
    parser.add_argument("--unfit", default="", help="nodes that preflight refused, with commas")
    parser.add_argument("--without-done", action="store_true", help="the ranks write none")
    given = parser.parse_args()
    if given.word == "begin":
        _refuse_if_used(given.run_dir, given.running.split(","))
        _begin(given.run_dir, given.nodes.split(","), given.lead)
    else:
        verdict = end(
            given.run_dir,
            job=_job(),
            code=given.code,
            stopped_by=given.stopped_by or None,
            cancelled=given.cancelled,
            preflight=given.unfit or None,
            lost=_lost(given.run_dir),
            writes_done=not given.without_done,
        )
        _say(f"{verdict.action}: {verdict.reason}")
        print(verdict.action, ",".join(verdict.exclude))


def _refuse_if_used(run_dir: Path, running: Sequence[str]) -> None:
    """Exit where the folder's open attempt is that of another job which is running."""
    row = open_attempt(run_dir)
    if row is not None and row["job"] != _job() and row["job"] in running:
        _say(
            f"job {row['job']} has an attempt in {run_dir} and still has nodes; let it, or cancel"
            f" it (scancel {row['job']}), and submit again when squeue shows it no more; a run of"
            " its own needs another RUN_DIR"
        )
        sys.exit(2)


def _begin(run_dir: Path, nodes: list[str], lead_s: float | None) -> None:
    number = begin(run_dir, job=_job(), nodes=nodes, lost=_lost(run_dir))
    if lead_s is not None and (advice := advise(run_dir, lead_s)):
        _say(advice)
    print(number)


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def _lost(run_dir: Path) -> list[str]:
    """Return the nodes of the attempt that has not ended which SLURM says went down meanwhile."""
    row = open_attempt(run_dir)
    if row is None:
        return []
    command = ["scontrol", "show", "node", "--oneliner", ",".join(row["nodes"])]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return went_down(text, datetime.fromisoformat(row["started"]))


def went_down(text: str, since: datetime) -> list[str]:
    """Return the nodes that are down, or whose daemon began after `since`.

    text: `scontrol show node --oneliner`.
    """
    lost = []
    for line in text.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        down = re.search(r"DOWN|NOT_RESPONDING|FAIL|\*", fields.get("State", ""))
        try:
            began = datetime.fromisoformat(fields.get("SlurmdStartTime", "")).astimezone()
        except ValueError:  # Unknown, None
            began = since
        if down or began > since:
            lost.append(fields["NodeName"])
    return lost


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
