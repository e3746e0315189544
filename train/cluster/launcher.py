"""torchrun as a job's script starts it: `python -m train.cluster.launcher TORCHRUN_ARGS`.

The same arguments and the same launch. But torchrun ends with 1 whatever its ranks ended with;
this ends with the first failed rank's own code (128 + number for a signal), and leaves it with the
reason in the folder that ATTEMPT_FOLDER names.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from train.cluster.failure import Failure, precedence, write_failure


def main() -> None:
    """Run the ranks of this node to their end."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        failures = error.failures
        said = {rank: _said(failure.message) for rank, failure in failures.items()}
        rank = min(
            failures,
            key=lambda r: precedence(failures[r].exitcode, failures[r].timestamp, said[r]),
        )
        first, message = failures[rank], said[rank]
        _leave(Failure(node, rank, first.exitcode, first.timestamp, message))
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except Exception as error:  # the ranks never met, say
        _leave(Failure(node, None, 1, time.time(), f"{type(error).__name__}: {error}"))
        raise


def _leave(failure: Failure) -> None:
    print(f"longhaul: {failure.describe()}", file=sys.stderr, flush=True)
    if folder := os.environ.get("ATTEMPT_FOLDER"):
        write_failure(Path(folder), failure)


def _said(message: Any) -> str:
    """Return what the rank left behind; a rank that left nothing has only torchrun's advice."""
    return str(message["message"]) if isinstance(message, dict) else ""


if __name__ == "__main__":
    main()
