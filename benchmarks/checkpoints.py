"""What a checkpoint costs: the stall of training, the write, verifying and reading it anew.

    python -m benchmarks.checkpoints [MEGABYTES]

One rank's share of fragments of float32. Medians of five, alternating, beside torch.save and
torch's own distributed checkpoint (its files are not hashed, and its index is a pickle). DCP loads
into tensors that are there; half of every row as the first of two ranks whose other rank does not
exist, in a process of its own. What is read was just written: it comes from memory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from parallel.tensor import Cut
from train.checkpoints.folder import Manifest, verify
from train.checkpoints.saver import Saver
from train.checkpoints.stored import Part, Stored

ROUNDS = 5
WIDTH = 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("megabytes", type=int, nargs="?", default=480)
    parser.add_argument("--halves", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.halves is not None:
        print(statistics.median(load_halves(options.halves)))
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows = options.megabytes * 1_000_000 // 3 // 4 // WIDTH // 8
    tensors = {
        f"{kind}/blocks.{i}.weight@0": torch.randn(rows * WIDTH)
        for i in range(8)
        for kind in ("master", "exp_avg", "exp_avg_sq")
    }
    with tempfile.TemporaryDirectory() as folder:
        times = measure(Path(folder), tensors, rows)
    size = sum(x.numel() for x in tensors.values()) * 4 / 1e6
    print(f"share of {size:.0f} MB, one thread, medians of {ROUNDS}\n")
    print("| what | seconds | MB/s |\n| --- | --- | --- |")
    for name, found in times.items():
        seconds = statistics.median(found)
        print(f"| {name} | {seconds:.3f} | {size / seconds:,.0f} |")


def measure(folder: Path, tensors: dict[str, torch.Tensor], rows: int) -> dict[str, list[float]]:
    """Return the seconds of each round, by what was measured."""
    saver = Saver(folder / "ours", timeout=timedelta(minutes=5), max_failures=1, say=print)
    times: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        began = time.perf_counter()
        action()
        times.setdefault(name, []).append(time.perf_counter() - began)

    for number in range(ROUNDS + 1):
        path = folder / f"ours/step-{number:08d}"
        began = time.perf_counter()
        timed(
            "longhaul, stall of training", lambda n=number: saver.start(tensors, manifest(n, rows))
        )
        saver.finish()
        times.setdefault("longhaul, copied, written, hashed, on disk", []).append(
            time.perf_counter() - began
        )
        timed("longhaul, verify", lambda p=path: verify(p))
        stored = Stored(path, verify(path))
        timed("longhaul, load", lambda s=stored: read(s, rows, 1))
        timed("longhaul, load half of every row (TP 1 to 2)", lambda s=stored: read(s, rows, 2))
        timed("torch.save", lambda: torch.save(tensors, folder / "plain.pt"))
        timed("torch.load", lambda: torch.load(folder / "plain.pt", weights_only=True))
        where = folder / f"dcp-{number}"
        matrices = {name: tensor.view(rows, WIDTH) for name, tensor in tensors.items()}
        timed("torch DCP save", lambda m=matrices, w=where: dcp.save(m, checkpoint_id=w))
        room = {name: torch.zeros_like(tensor) for name, tensor in matrices.items()}
        timed("torch DCP load", lambda r=room, w=where: dcp.load(r, checkpoint_id=w))
        assert all(torch.equal(room[name], tensor) for name, tensor in matrices.items())
        del room
        began = time.perf_counter()
        future = dcp.async_save(dict(tensors), checkpoint_id=folder / f"async-{number}")
        times.setdefault("torch DCP async_save, stall", []).append(time.perf_counter() - began)
        future.result()
        if number == 0:
            times = {name: [] for name in times}  # the first touches fresh memory
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.checkpoints", "--halves", str(where)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    times["torch DCP load, half of every row"] = [float(done.stdout.split()[-1])]
    return times


def load_halves(folder: Path) -> list[float]:
    """Return the seconds of DCP's loads of the first of two ranks that cut every row."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    mesh, found = init_device_mesh("cpu", (2,)), []
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    room = {
        name: DTensor.from_local(torch.zeros(rows, width // 2), mesh, [Shard(1)])
        for name, (rows, width) in ((name, of.size) for name, of in saved.items())
    }
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        dcp.load(room, checkpoint_id=folder, no_dist=True)
        found.append(time.perf_counter() - began)
    assert all(bool(half.to_local().any()) for half in room.values())
    return found[1:]


def read(stored: Stored, rows: int, tp: int) -> None:
    """Read what the first of tp ranks would hold, if every matrix were cut by columns."""
    for name in stored.manifest.parameters:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            stored.part(kind, name, Part(Cut(1, 1), tp, 0, slice(0, rows * WIDTH // tp)))


def manifest(step: int, rows: int) -> Manifest:
    """Return what the saver wants to know."""
    shape = {"shape": [rows, WIDTH], "dim": None, "stride": 1}
    return Manifest(
        step=step, position=0, updates=step, nonfinite=0,
        layout={"tp": 1, "cp": 1, "dp": 1, "zero": 1}, config={}, data="", vocab_size=0,
        parameters={f"blocks.{i}.weight": shape for i in range(8)}, versions={}, files={},
    )  # fmt: skip


if __name__ == "__main__":
    main()
