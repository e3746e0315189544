"""A training step, forward to optimizer, beside other stacks' on the same shape (peers.py).

    python -m benchmarks.step [--tokens 1024] [--precision bf16] [--memory none] [--rounds 5]
    python -m benchmarks.step --peak ours|hf|hf-ckpt ...     one of them alone: its peak memory
    python -m benchmarks.step --profile ours ...             ... where its time goes

8 layers of width 512, 8 query and 4 key heads, FFN 1408, vocabulary 32000, one thread, the same
fused AdamW. Each way is a process of its own. Tokens per CPU second, medians of alternating rounds:
what else runs on the machine takes wall time and no CPU time of ours (it still takes caches and
bandwidth). "-heap" is a peer in a process whose memory is managed as ours is (parallel/heap.py).
The last column is causal FLOPs, each way's own memory counted, in those of a large matrix product.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from benchmarks.peers import (
    Shape,
    megatron_gpt,
    torchtitan_llama,
    training_step,
    transformers_llama,
)
from data.streams import Batch
from model.config import NoMemory
from parallel.heap import settle_heap
from parallel.mesh import build_mesh, start_processes
from train.build import build, to_model_config
from train.loop import TrainState, train_steps
from train.settings.config import Config, validate
from train.speed.metrics import training_flops_per_token

VOCABULARY = Shape(0).vocab_size
Step = Callable[[], float]


def configuration(options: argparse.Namespace) -> Config:
    """Return one rank's run of one sample a step."""
    segment = min(options.tokens, options.segment or options.tokens)
    memory: dict[str, Any] = {"name": options.memory}
    shape = Shape(options.tokens)._asdict()
    del shape["tokens"]
    return validate(
        {
            "name": "step",
            "model": {**shape, "memory": memory},
            "data": {"train": "-", "segment_len": segment, "sample_len": options.tokens},
            "parallel": {"tp": 1, "cp": 1, "zero": 1},
            "train": {
                "steps": 1000, "batch_size": 1, "micro_batch": 1, "lr": 1e-3,
                "precision": options.precision, "checkpointing": options.checkpointing,
                "ffn_chunk": options.ffn_chunk, "loss_chunk": options.loss_chunk,
                "schedule": "constant", "warmup_steps": 0, "compile": options.compile,
            },
        }
    )  # fmt: skip


def ours(options: argparse.Namespace) -> Step:
    """Return the step as `longhaul pretrain` does it, without reading data."""
    config = configuration(options)
    mesh = build_mesh(tp=1, cp=1)
    built = build(config, to_model_config(config, VOCABULARY), mesh)
    state, size = TrainState(), config.data.segment_len

    def step() -> float:
        ids = torch.randint(0, VOCABULARY, (1, options.tokens + 1))
        batch = Batch(
            tokens=ids[:, :-1].reshape(1, -1, size),
            labels=ids[:, 1:].reshape(1, -1, size),
            starts=torch.zeros(1, options.tokens // size, dtype=torch.bool),
            first_position=state.step,
            offsets=torch.zeros(1, dtype=torch.int64),
        )
        state.memory.clear()  # each sample a document of its own
        return next(train_steps(config, built, mesh, state, [[batch]])).loss

    return step


def peer(options: argparse.Namespace, name: str) -> Step:
    """Return another stack's step; `-compiled`: with each layer compiled; `-whole`: all of it."""
    shape = Shape(options.tokens)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    found = {
        "hf": lambda: transformers_llama(shape),
        "hf-ckpt": lambda: transformers_llama(shape, checkpointing=True),
        "mcore": lambda: megatron_gpt(shape, dtype),
        "titan": lambda: torchtitan_llama(shape),
    }[name.removesuffix(COMPILED).removesuffix(WHOLE)]()
    if name.endswith(WHOLE):
        found = found._replace(loss=torch.compile(found.loss))
    if name.endswith(COMPILED):
        for layer in found.layers:
            layer.compile()
    return training_step(found, shape, options.precision)


COMPILED, WHOLE, HEAP = "-compiled", "-whole", "-heap"
PEERS = ["hf", "hf-ckpt", "mcore", "titan"]
WAYS = ["ours", *(name + how for name in PEERS for how in ("", COMPILED, WHOLE))]


def prepare(name: str, options: argparse.Namespace) -> Step:
    """Return a way's step, in the process that is to do it."""
    if name.endswith(HEAP):
        settle_heap()
    if name == "ours":
        start_processes(timedelta(minutes=10), tight_heap=options.ffn_chunk is not None)
    name = name.removesuffix(HEAP)
    return ours(options) if name == "ours" else peer(options, name)


def serve(step: Step) -> None:
    """Do a step for each line read, and answer with its CPU seconds."""
    for _ in sys.stdin:
        began = time.process_time()
        step()
        print(time.process_time() - began, flush=True)


def alternate(names: list[str], rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of each way's steps; the first two of each are not counted."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step", *sys.argv[1:]]
    ways = {
        name: subprocess.Popen(
            [*command, "--serve", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in names
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(2 + rounds):
        for name, process in ways.items():
            assert process.stdin is not None and process.stdout is not None
            print(file=process.stdin, flush=True)
            found = float(process.stdout.readline())
            seconds[name] += [found] if number >= 2 else []
    for process in ways.values():
        process.communicate()
    return seconds


def flops_per_token(options: argparse.Namespace, name: str) -> float:
    """Return a way's FLOPs in training; the peers have no memory and one segment."""
    config = configuration(options)
    model, size = to_model_config(config, VOCABULARY), config.data.segment_len
    if name != "ours":
        model, size = replace(model, memory=NoMemory()), options.tokens
    return training_flops_per_token(model, size)


def profile(step: Step) -> str:
    """Return a table of the operations that take 1 % and more of three steps' CPU time."""
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    whole = sum(row.self_cpu_time_total for row in rows)
    table = "| operation | share | calls a step |\n| --- | --- | --- |"
    for row in rows:
        if row.self_cpu_time_total >= 0.01 * whole:
            share = row.self_cpu_time_total / whole
            table += f"\n| {row.key[:60]} | {share:.3f} | {row.count // 3} |"
    return table


def matmul_peak(precision: str) -> float:
    """Return FLOP/s of a large matrix product, one thread: median of nine."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    found = []
    for _ in range(9):
        began = time.process_time()
        for _ in range(4):
            a @ b
        found.append(time.process_time() - began)
    return 4 * 2 * 1024**3 / statistics.median(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--segment", type=int)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--memory", default="none")
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument("--ffn-chunk", type=int)
    parser.add_argument("--loss-chunk", type=int, default=1024)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default="hf,hf-compiled,hf-whole,mcore-compiled,hf-whole-heap")
    every = [*WAYS, *(f"{name}{HEAP}" for name in WAYS)]
    parser.add_argument("--peak", choices=every)
    parser.add_argument("--profile", choices=every)
    parser.add_argument("--serve", choices=every, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        serve(prepare(options.serve, options))
        return
    if options.peak:
        step = prepare(options.peak, options)
        for _ in range(3):
            step()
        print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
        return
    if options.profile:
        print(profile(prepare(options.profile, options)))
        return
    names = ["ours", *options.peers.split(",")]
    seconds = {name: statistics.median(s) for name, s in alternate(names, options.rounds).items()}
    best = min(seconds[name] for name in names[1:])
    peak = matmul_peak(options.precision)
    print(
        f"{options.tokens} tokens, {options.precision}, matrix product {peak / 1e9:.0f} GFLOP/s\n"
    )
    print("| | tokens per CPU second | against the best peer | share of peak |")
    print("| --- | --- | --- | --- |")
    for name, found in seconds.items():
        speed = options.tokens / found
        share = speed * flops_per_token(options, name) / peak
        print(f"| {name} | {speed:.1f} | {best / found:.2f} | {share:.2f} |")


if __name__ == "__main__":
    main()
