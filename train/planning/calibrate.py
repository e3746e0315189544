"""Measures this machine and writes what it finds as a cluster description."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
import yaml
from torch.multiprocessing.spawn import spawn

from data.durable import write_atomically
from model.kernels import choose_kernel
from train.planning.cluster import Cluster
from train.speed.metrics import Precision, peak_flops

BUDGET_S = 0.6
"""Of one measurement, the first run not counted."""


class _Rates(NamedTuple):
    matmul: float  # FLOP/s of products of a model's shapes
    attention: float
    attention_backward: float


def calibrate(path: Path) -> Iterator[str]:
    """Measure for well under a minute, write a cluster's YAML file, and yield lines about it.

    Messages are measured between two processes: two GPUs by NCCL, where there are, else by gloo.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # a rank's, under torchrun
    bf16, fp32 = _peak(device, "bf16"), _peak(device, "fp32")
    yield f"peak: {bf16:.3g} FLOP/s bfloat16, {fp32:.3g} float32"
    wide = device.type == "cpu"  # what a CPU trains in
    peak = fp32 if wide else bf16
    rates = _rates(torch.float32 if wide else torch.bfloat16, device)
    yield (
        f"of it: products {rates.matmul / peak:.0%}, attention {rates.attention / peak:.0%},"
        f" its backward {rates.attention_backward / peak:.0%}"
    )
    moved, launch = _copy_rate(device), _launch_s(device)
    host = _host_rate(device, moved)
    yield f"copies: {moved:.3g} bytes/s; an operation takes at least {launch:.2g} s"
    number = torch.cuda.device_count() if device.type == "cuda" else 2
    rate, latency = _messages(device) if number > 1 else (moved, 1e-5)
    yield f"messages between two processes: {rate:.3g} bytes/s, {latency:.2g} s"
    disk = _disk_rate(path.parent)
    yield f"disk: {disk:.3g} bytes/s"
    memory = psutil.virtual_memory().total
    per_node = number if device.type == "cuda" else (os.cpu_count() or 1)
    free = torch.cuda.mem_get_info()[1] if device.type == "cuda" else memory // per_node
    link = {"rate": rate, "latency_s": latency}
    values: dict[str, Any] = {
        "name": path.stem,
        "source": f"longhaul plan --calibrate, torch {torch.__version__}; the network is not"
        " measured: it stands as the node's own link, and failures are a guess",
        "device": {
            "kind": device.type,
            "peak_bf16": bf16,
            "peak_fp32": fp32,
            "matmul": min(1.0, rates.matmul / peak),
            "attention": min(1.0, rates.attention / peak),
            "attention_backward": min(1.0, rates.attention_backward / peak),
            "memory_bytes": free,
            "memory_rate": moved,
            "host_rate": host,
            "launch_s": launch,
            "reserved_bytes": 2 << 30 if device.type == "cuda" else 400 << 20,
            "fragmentation": 0.05,
        },
        "per_node": per_node,
        "host_bytes": memory,
        "node": link,
        "network": dict(link),
        "overlap": 0.8 if device.type == "cuda" else 0.5,
        "disk_rate": disk,
        "failures_per_node_day": 0.004,
        "restart_s": 600,
    }
    Cluster.model_validate(values)
    write_atomically(path, yaml.safe_dump(values, sort_keys=False))
    yield f"written: {path}; try `longhaul plan FILE --gpu {path}`"


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of run; on a CPU that of one thread, other processes left out."""
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    run()
    took: list[float] = []
    begin = time.perf_counter()
    while len(took) < 3 or time.perf_counter() - begin < BUDGET_S:
        _wait(device)
        start = clock()
        run()
        _wait(device)
        took.append(clock() - start)
    return statistics.median(took)


def _peak(device: torch.device, precision: Precision) -> float:
    """Return FLOP/s: of a GPU its data sheet's, of a CPU those of the best square product."""
    if device.type == "cuda":
        return peak_flops(device, precision).flops_per_s
    a = torch.ones(1024, 1024, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2.0 * 1024**3 / _seconds(lambda: a @ a, device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rates(dtype: torch.dtype, device: torch.device) -> _Rates:
    big = device.type == "cuda"
    rows, width, inner = (8192, 4096, 14336) if big else (1024, 512, 1408)
    a = torch.randn(rows, width, dtype=dtype, device=device)
    b = torch.randn(width, inner, dtype=dtype, device=device)
    matmul = 2.0 * rows * width * inner / _seconds(lambda: a @ b, device)
    length, heads, keys, size = (8192, 32, 8, 128) if big else (2048, 8, 4, 64)
    q = torch.randn(1, heads, length, size, dtype=dtype, device=device)
    k, v = (torch.randn(1, keys, length, size, dtype=dtype, device=device) for _ in "kv")
    kernel = choose_kernel(q)
    flops = 4.0 * heads * size * length * (length + 1) / 2
    out, lse = kernel.forward(q, k, v, True)
    forward = _seconds(lambda: kernel.forward(q, k, v, True), device)
    backward = _seconds(lambda: kernel.backward(out, q, k, v, out, lse, True), device)
    return _Rates(matmul, flops / forward, 2.5 * flops / backward)


def _copy_rate(device: torch.device) -> float:
    """Return bytes/s, read and written both counted."""
    size = 1 << (30 if device.type == "cuda" else 26)
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2.0 * size / _seconds(lambda: b.copy_(a), device)


def _host_rate(device: torch.device, moved: float) -> float:
    if device.type == "cpu":
        return moved / 2
    a = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    b = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    return (1 << 28) / _seconds(lambda: b.copy_(a), device)


def _launch_s(device: torch.device) -> float:
    x = torch.ones(16, device=device)

    def many() -> None:
        y = x
        for _ in range(500):
            y = y + 1.0

    return _seconds(many, device) / 500


def _disk_rate(folder: Path) -> float:
    """Return bytes/s of a synced write beside the file that is made."""
    data = b"\1" * (64 << 20)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - begin)


def _messages(device: torch.device) -> tuple[float, float]:
    """Return bytes/s and the latency of a hop in a ring of two processes."""
    # The processes import the libraries anew, which have notes to print.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    with tempfile.TemporaryDirectory() as folder:
        spawn(_exchange, (device.type, folder), nprocs=2)
        big, small, size = torch.load(Path(folder, "times")).tolist()
    return size / max(big - small, 1e-9), small


def _exchange(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    backend = "nccl" if kind == "cuda" else "gloo"
    # (The name is there at run time, the stub does not export it.)
    store = dist.FileStore(f"{folder}/store", 2)  # type: ignore[attr-defined]
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    dist.init_process_group(backend, store=store, rank=rank, world_size=2)
    times = []
    for size in (1 << 24, 8):
        out, into = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        ops = [dist.P2POp(dist.isend, out, 1 - rank), dist.P2POp(dist.irecv, into, 1 - rank)]
        took = []
        for _ in range(12):  # as often on both sides
            _wait(device)
            begin = time.perf_counter()
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            _wait(device)
            took.append(time.perf_counter() - begin)
        times.append(statistics.median(took[2:]))
    if rank == 0:
        torch.save(torch.tensor([*times, float(1 << 24)], dtype=torch.float64), f"{folder}/times")
    dist.destroy_process_group()
