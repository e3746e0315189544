"""A training step, forward to optimizer, beside Hugging Face transformers on the same shape.

    python benchmarks/step.py [--tokens 1024] [--precision bf16] [--memory none] [--rounds 5]
    python benchmarks/step.py --peak ours|hf|hf-ckpt ...      one of them alone: its peak memory

8 layers of width 512, 8 query and 4 key heads, FFN 1408, vocabulary 32000, one thread, the same
fused AdamW. Each way is a process of its own. Tokens per CPU second, medians of alternating rounds:
what else runs on the machine takes wall time and no CPU time of ours (it still takes caches and
bandwidth). "-heap" is a peer in a process whose memory is managed as ours is (parallel/heap.py).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from data.streams import Batch
from parallel.heap import settle_heap
from parallel.mesh import build_mesh, start_processes
from train.build import build, to_model_config
from train.loop import TrainState, train_steps
from train.settings.config import Config, validate

SHAPE = {
    "num_layers": 8, "hidden_size": 512, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 1408,
    "vocab_size": 32000, "tie_embeddings": False,
}  # fmt: skip
Step = Callable[[], float]


def configuration(options: argparse.Namespace) -> Config:
    """Return one rank's run of one sample a step."""
    segment = min(options.tokens, options.segment or options.tokens)
    memory: dict[str, Any] = {"name": options.memory}
    return validate(
        {
            "name": "step",
            "model": {**SHAPE, "memory": memory},
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
    built = build(config, to_model_config(config, SHAPE["vocab_size"]), mesh)
    state, size = TrainState(), config.data.segment_len

    def step() -> float:
        ids = torch.randint(0, SHAPE["vocab_size"], (1, options.tokens + 1))
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


def hugging_face(
    options: argparse.Namespace, *, checkpointing: bool = False, compiled: bool = False
) -> Step:
    """Return the step of transformers' LlamaForCausalLM: sdpa, autocast, the same AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=SHAPE["hidden_size"],
            num_hidden_layers=SHAPE["num_layers"],
            num_attention_heads=SHAPE["num_heads"],
            num_key_value_heads=SHAPE["num_kv_heads"],
            intermediate_size=SHAPE["ffn_size"],
            vocab_size=SHAPE["vocab_size"],
            max_position_embeddings=options.tokens,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        ids = torch.randint(0, SHAPE["vocab_size"], (1, options.tokens))
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


WAYS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "ours": ours,
    "hf": hugging_face,
    "hf-compiled": lambda options: hugging_face(options, compiled=True),
    "hf-ckpt": lambda options: hugging_face(options, checkpointing=True),
}
HEAP = "-heap"


def prepare(name: str, options: argparse.Namespace) -> Step:
    """Return a way's step, in the process that is to do it."""
    if name.endswith(HEAP):
        settle_heap()
    if name == "ours":
        start_processes(timedelta(minutes=10), tight_heap=options.ffn_chunk is not None)
    return WAYS[name.removesuffix(HEAP)](options)


def serve(step: Step) -> None:
    """Do a step for each line read, and answer with its CPU seconds."""
    for _ in sys.stdin:
        began = time.process_time()
        step()
        print(time.process_time() - began, flush=True)


def alternate(names: list[str], rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of each way's steps; the first two of each are not counted."""
    command = [sys.executable, *sys.argv]
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
    parser.add_argument("--peers", default="hf,hf-compiled,hf-compiled-heap")
    every = [*WAYS, *(f"{name}{HEAP}" for name in WAYS)]
    parser.add_argument("--peak", choices=every)
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
    names = ["ours", *options.peers.split(",")]
    seconds = {name: statistics.median(s) for name, s in alternate(names, options.rounds).items()}
    best = min(seconds[name] for name in names[1:] if not name.endswith(HEAP))
    print(
        f"{options.tokens} tokens, {options.precision}, peak {matmul_peak(options.precision):.3g}"
    )
    print("| | tokens per CPU second | against the best peer |\n| --- | --- | --- |")
    for name, found in seconds.items():
        print(f"| {name} | {options.tokens / found:.1f} | {best / found:.2f} |")


if __name__ == "__main__":
    main()
