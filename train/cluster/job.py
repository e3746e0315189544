"""What slurm/lib.sh asks between the ranks' launches: `python -m train.cluster.job WORD RUN_DIR`.

begin: an attempt begins; prints its number. end: it has ended; prints `done`, `stop` or `requeue`,
and after it the nodes to leave out from now on. Reasons go to stderr, into the job's log.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from train.cluster.attempts import begin, end, unended_nodes
from train.cluster.lead import advise


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m train.cluster.job")
    parser.add_argument("word", choices=("begin", "end"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--nodes", default="", help="those of the job, with commas")
    parser.add_argument("--lead", type=float, help="seconds between the signal and the limit")
    parser.add_argument("--code", type=int, default=0, help="what the ranks ended with")
    parser.add_argument("--stopped-by", default="", help="the signal that the script heard")
    parser.add_argument("--cancelled", action="store_true", help="by somebody, for good")
    parser.add_argument("--unfit", default="", help="nodes that preflight refused, with commas")
    given = parser.parse_args()
    if given.word == "begin":
        _begin(given.run_dir, given.nodes.split(","), given.lead)
    else:
        verdict = end(
            given.run_dir,
            code=given.code,
            stopped_by=given.stopped_by or None,
            cancelled=given.cancelled,
            preflight=given.unfit or None,
        )
        _say(f"{verdict.action}: {verdict.reason}")
        print(verdict.action, ",".join(verdict.exclude))


def _begin(run_dir: Path, nodes: list[str], lead_s: float | None) -> None:
    were, since = unended_nodes(run_dir)
    lost = [] if since is None else [node for node in were if _went_down(node, since)]
    number = begin(run_dir, job=os.environ.get("SLURM_JOB_ID"), nodes=nodes, lost=lost)
    if lead_s is not None and (advice := advise(run_dir, lead_s)):
        _say(advice)
    print(number)


def _went_down(node: str, since: str) -> bool:
    """Return whether SLURM says that a node is down, or its daemon began after `since`."""
    command = ["scontrol", "show", "node", "--oneliner", node]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    state = re.search(r"\bState=(\S+)", text)
    if state and re.search(r"DOWN|NOT_RESPONDING|FAIL|\*", state[1]):
        return True
    began = re.search(r"\bSlurmdStartTime=(\S+)", text)
    try:
        return began is not None and datetime.fromisoformat(
            began[1]
        ).astimezone() > datetime.fromisoformat(since)
    except ValueError:  # Unknown, None
        return False


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
