"""One cluster for all tests that need one."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import MISSING, Cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Eight nodes of eight pretend GPUs, that find this checkout's longhaul."""
    if MISSING:
        pytest.skip(
            f"SLURM is not installed (no {', '.join(MISSING)}): apt-get install"
            " --no-install-recommends slurmd slurmctld slurm-client munge"
        )
    with Cluster(nodes=8) as running:
        running.environment.update(
            GLOO_SOCKET_IFNAME="lo",
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            PYTHONPATH=str(ROOT),
        )
        yield running
