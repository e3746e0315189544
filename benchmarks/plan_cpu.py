"""Compares plans with training on this CPU: one table of seconds and bytes a step.

Run from the repository root: python benchmarks/plan_cpu.py CLUSTER.yaml [RUN ...]
(the file that `longhaul plan --calibrate CLUSTER.yaml` wrote, on the same machine). Each run is a
process of one thread. Seconds are of CPU time, so that other work on the machine counts little.
Bytes are what resident memory grew by, from before the model was built to its peak: in a second
process whose allocator gives every tensor's pages back at once (glibc's MALLOC_MMAP_THRESHOLD_), so
that they are what tensors hold; and as users see it, with what the allocator keeps.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

RUNS: dict[str, tuple[str, ...]] = {
    "none, 1k": (),
    "none, 1k, block checkpointing": ("train.checkpointing=block",),
    "none, 4k": ("data.segment_len=4k", "data.sample_len=4k"),
    "window, 4 x 1k": ("model.memory=window", "data.sample_len=4k"),
    "fam, 4 x 1k": ("model.memory=fam", "data.sample_len=4k"),
    "infini, 4 x 1k": ("model.memory=infini", "data.sample_len=4k"),
    "rmt, 4 x 1k, block": (
        "model.memory=rmt", "data.sample_len=4k", "train.checkpointing=block",
    ),
}  # fmt: skip
STEPS = 3
RETURNING = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "10000000",
    "MALLOC_TRIM_THRESHOLD_": "0",
}

VALUES: dict[str, Any] = {
    "name": "plan",
    "model": {
        "vocab_size": 4096,
        "num_layers": 8,
        "hidden_size": 512,
        "num_heads": 8,
        "num_kv_heads": 4,
        "ffn_size": 1408,
    },
    "data": {"train": "shards", "segment_len": 1024, "sample_len": 1024},
    "train": {"steps": 10, "batch_size": 1, "lr": 1e-3, "loss_chunk": 256},
}


def config_of(name: str) -> Any:
    """Return the configuration of a run."""
    from train.settings.config import apply_overrides, parse_overrides, validate

    return validate(apply_overrides(VALUES, parse_overrides(RUNS[name])), world_size=1)


def measure(name: str) -> None:
    """Train a few steps; print the seconds of one and the bytes that memory grew by."""
    import torch

    torch.set_num_threads(1)
    from parallel.mesh import build_mesh, start_processes
    from parallel.zero import load_deepspeed
    from train.build import build, to_model_config
    from train.quiet import quieten_libraries

    quieten_libraries()
    load_deepspeed("cpu")  # its libraries are no part of the model

    config = config_of(name)
    start_processes()
    mesh = build_mesh(tp=1, cp=1)
    before = _resident()
    built = build(config, to_model_config(config, 4096), mesh)
    segments = config.num_segments
    tokens = torch.randint(4096, (1, segments, config.data.segment_len))
    starts = torch.zeros(1, segments, dtype=torch.bool)
    took = []
    for _ in range(STEPS + 1):
        begin = time.process_time()
        scale = torch.ones(()) / tokens.numel()
        loss = built.engine(tokens, starts, labels=tokens, scale=scale).loss
        built.engine.backward(loss, last=True)
        del loss
        built.engine.step(1e-3)
        took.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(statistics.median(took[1:]), peak - before)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _told(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return the seconds and bytes that a process of `measure` prints."""
    told = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | environment
    ).stdout
    seconds, grew = map(float, told.split()[-2:])
    return seconds, grew


def main() -> None:
    """Print the table."""
    from train.planning import load_cluster, plan

    cluster = load_cluster(sys.argv[1])
    print(
        "| run | step planned | measured | error | memory planned | measured | error |"
        " with what the allocator keeps |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[2:] or RUNS:
        made = plan(config_of(name), cluster, 1, 1)
        command = [sys.executable, __file__, "--measure", name]
        took, resident = _told(command, {})
        _, grew = _told(command, RETURNING)
        parts = made.memory.parts
        held = made.memory.total - parts["reserved"] - parts["fragmentation"]
        print(
            f"| {name} | {made.time.total:.2f} s | {took:.2f} s |"
            f" {made.time.total / took - 1:+.0%} | {held / 2**20:,.0f} MiB |"
            f" {grew / 2**20:,.0f} MiB | {held / grew - 1:+.0%} | {resident / 2**20:,.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(sys.argv[2])
    else:
        main()
