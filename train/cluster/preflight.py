"""What one node can say of itself before the ranks start: GPUs, disks, names, arithmetic.

Each check returns what it found, and a problem if the node is not fit for training with it. What
only makes a node slower than others shows when nodes are compared (train.cluster.meeting).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from train.checkpoints.names import list_checkpoints
from train.cluster.failure import PREFLIGHT

FREE_BYTES = 1 << 30
"""On the disk of the run folder, at least; or twice its newest checkpoint."""
SHM_BYTES = 64 << 20
"""Of /dev/shm for each GPU rank: NCCL's channels; containers often have 64 MiB in all."""
_GPU_FIELDS = (
    "index",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
)


class Found(NamedTuple):
    """What a check found."""

    name: str
    value: str
    problem: str | None = None


def check_node(run_dir: Path, ranks: int) -> list[Found]:
    """Return what this node's checks found; none raises. ranks: to be started here."""
    checks: tuple[Callable[[], Found], ...] = (
        lambda: check_gpus(ranks),
        lambda: check_disk(run_dir),
        lambda: check_shm(ranks),
        lambda: check_writing(run_dir),
        check_name,
        lambda: check_torch(ranks),
        check_arithmetic,
    )
    found = []
    for check in checks:
        try:
            found.append(check())
        except Exception as error:  # a node on which a check cannot even run is not fit
            found.append(Found("check", "", f"{type(error).__name__}: {error}"))
    return found


def check_gpus(ranks: int) -> Found:
    """Return the GPUs: as many as ranks, without memory errors, not slowed down by heat."""
    expected = _gpus_of_job()
    if shutil.which("nvidia-smi") is None:
        problem = (
            f"{expected} GPUs were asked for, and there is no nvidia-smi" if expected else None
        )
        return Found("GPUs", "none", problem)
    answer = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    if answer.returncode:
        said = (answer.stdout + answer.stderr).strip()
        return Found("GPUs", "", f"nvidia-smi failed with {answer.returncode}: {said}")
    rows = [line.split(", ") for line in answer.stdout.splitlines() if line.strip()]
    return judge_gpus(rows, max(ranks, expected))


def _gpus_of_job() -> int:
    return int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))


def judge_gpus(rows: list[list[str]], needed: int) -> Found:
    """Return what nvidia-smi's rows (see _GPU_FIELDS) say."""
    problems = []
    if len(rows) < needed:
        problems.append(f"{len(rows)} GPUs of {needed}")
    for index, errors, slowdown, thermal in rows:
        if errors.isdigit() and int(errors):
            problems.append(f"GPU {index} had {errors} uncorrected memory errors: it needs a reset")
        if "Active" in (slowdown.strip(), thermal.strip()):
            problems.append(f"GPU {index} is slowed down by its hardware (heat or power)")
    return Found("GPUs", str(len(rows)), "; ".join(problems) or None)


def check_disk(run_dir: Path) -> Found:
    """Return the space for checkpoints."""
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    newest = list_checkpoints(run_dir / "checkpoints")[-1:]
    size = sum(file.stat().st_size for path in newest for file in path.iterdir())
    needed = max(FREE_BYTES, 2 * size)
    problem = None
    if free < needed:
        problem = f"{existing} has {free / 1e9:.1f} GB free, checkpoints need {needed / 1e9:.1f}"
    return Found("disk", f"{free / 1e9:.0f} GB", problem)


def check_shm(ranks: int) -> Found:
    """Return the free space of /dev/shm, which ranks of one node talk through on GPUs."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Found("/dev/shm", "none")
    free, needed = shutil.disk_usage(shm).free, ranks * SHM_BYTES
    problem = None
    if free < needed and shutil.which("nvidia-smi") is not None:
        problem = f"/dev/shm has {free >> 20} MiB free, {ranks} ranks need {needed >> 20}"
    return Found("/dev/shm", f"{free / 1e9:.1f} GB", problem)


def check_writing(run_dir: Path) -> Found:
    """Return how long a small file takes to be on the run folder's disk, and back."""
    began = time.perf_counter()
    path = run_dir / f"{PREFLIGHT}{socket.gethostname()}-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(b"longhaul")
            file.flush()
            os.fsync(file.fileno())
        same = path.read_bytes() == b"longhaul"
        path.unlink()
    except OSError as error:
        return Found("write", "", f"{run_dir} cannot be written: {error}")
    problem = None if same else f"{run_dir} gives back other bytes than were written"
    return Found("write", f"{time.perf_counter() - began:.2f} s", problem)


def check_name() -> Found:
    """Return this host's own address by name: gloo asks for it, unless told which network."""
    name = socket.gethostname()
    try:
        return Found("name", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        told = os.environ.get("GLOO_SOCKET_IFNAME")
        problem = f"{name} does not resolve here ({error}); mend /etc/hosts or the name server"
        return Found("name", name, None if told else problem)


def check_torch(ranks: int) -> Found:
    """Return which torch this is: in a job with GPUs it must see one for each rank.

    With fewer the ranks of this node would compute on its CPU.
    """
    import torch

    seen, problem = torch.cuda.device_count(), None
    if _gpus_of_job() and seen < ranks:
        built = "is built without CUDA" if torch.version.cuda is None else f"sees {seen} GPUs"
        problem = f"torch {torch.__version__} {built}, and {ranks} ranks need one GPU each"
    return Found("torch", torch.__version__, problem)


def check_arithmetic() -> Found:
    """Return the rate of a product on each device, compared with the exact result."""
    import torch

    from train.speed.metrics import measure_peak

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rates, problems = [], []
    whole = torch.arange(256 * 256, dtype=torch.float64).view(256, 256).remainder(7) - 3
    for device in gpus or [torch.device("cpu")]:
        # Integers so small that float32 holds every sum: any difference is a fault.
        factor = whole.to(device, torch.float32)
        if not torch.equal((factor @ factor.T).cpu().double(), whole @ whole.T):
            problems.append(f"{device} multiplies wrongly")
        peak = measure_peak(device, "bf16" if device.type == "cuda" else "fp32")
        rates.append(peak.flops_per_s / 1e12)
    return Found("matmul", f"{min(rates):.3g} TFLOP/s", "; ".join(problems) or None)
