"""Everything that only a GPU can tell, in one command: first whether it is right, then how fast.

    python benchmarks/gpu.py [--output runs/gpu] [--parts kernels,memories,step,...] [--tiny]

Each part is a process of its own, so one that fails costs no other, and writes its table to
OUTPUT/gpu.md as soon as it has it. Needs one GPU of 80 GB. Timings: medians of rounds between two
synchronisations, after two rounds that are not counted. `--tiny` runs the same code on toy sizes,
on a CPU too: it shows that the command works, and no number of it means anything.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.length import MEMORIES
from data.landmarks import insert_landmarks
from data.streams import Batch
from model.attention import Alone, Exchange, Whole
from model.config import (
    ArmtMemory,
    ComputeConfig,
    LandmarkMemory,
    MemoryConfig,
    ModelConfig,
    NoMemory,
)
from model.decoder import Decoder
from model.init import initialise
from model.kernels import Blockwise, Kernel, choose_kernel
from model.local import FoldedSequence
from model.memory.base import Carried
from model.memory.grouped import GroupedSoftmax, choose_grouped
from model.stream import Stream
from parallel.mesh import build_mesh, start_processes
from parallel.ring import Hop, Ring
from parallel.slicing import choose_layout
from train.build import build, to_model_config
from train.loop import TrainState, train_steps
from train.metrics import mfu, peak_flops, training_flops_per_token
from train.settings.config import validate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16
Table = Iterator[list[str]]


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of a run on the device."""
    found = []
    for _ in range(rounds + 2):
        _wait()
        began = time.perf_counter()
        run()
        _wait()
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def error(own: Tensor, other: Tensor) -> float:
    """Return the relative difference, in float64 on the host."""
    a, b = own.detach().cpu().double(), other.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def kernels(tiny: bool) -> Table:
    """Each kernel against its slow twin in float64 on the host: forward and backward."""
    yield ["kernel", "type", "out", "lse", "dq", "dk", "dv"]
    length, block = (128, 16) if tiny else (2048, 64)
    for name in ("attention", "grouped"):
        for dtype in (torch.float32, HALF):
            generator = torch.Generator().manual_seed(0)
            given = [
                torch.randn(1, heads, length, 64, generator=generator).to(dtype)
                for heads in (8, 2, 2, 8)
            ]
            here, wide = [x.to(DEVICE) for x in given], [x.double() for x in given]
            slow: Any = Blockwise() if name == "attention" else GroupedSoftmax(block)
            fast: Any = choose_kernel(here[0])
            if name == "grouped":
                fast = choose_grouped(here[0], block)
            cells = []
            for kernel, (q, k, v, dout) in ((slow, wide), (fast, here)):
                out, lse = kernel.forward(q, k, v, True)
                cells.append([out, lse, *kernel.backward(dout, q, k, v, out, lse, True)])
            errors = [f"{error(own, other):.1e}" for other, own in zip(*cells, strict=True)]
            yield [type(fast).__name__, str(dtype).removeprefix("torch."), *errors]


def small(memory: MemoryConfig, tiny: bool) -> ModelConfig:
    """Return a small model of any memory."""
    marked = isinstance(memory, LandmarkMemory)
    return ModelConfig(256 + marked, 2, 64 if tiny else 256, 4, 2, 128, 16, memory=memory)


def read(memory: MemoryConfig, segments: int, length: int, vocab: int) -> Batch:
    """Return random tokens of one document, landmarks among them where the memory wants them."""
    ids = torch.randint(0, vocab, (1, segments, length))
    starts = torch.zeros(1, segments, dtype=torch.bool)
    starts[0, 0] = True
    offsets = torch.zeros(1, segments, dtype=torch.int64)
    batch = Batch(ids, ids.roll(-1, -1), starts, offsets, first_position=0)
    if isinstance(memory, LandmarkMemory):
        return insert_landmarks(batch, memory.block, vocab)
    return batch


def memories(tiny: bool) -> Table:
    """Loss and gradients of each memory on the device against the host, both in float32."""
    yield ["memory", "loss, fp32", "gradients, fp32", "loss, bf16", "gradients, bf16"]
    for name, memory in {"none": NoMemory(), **MEMORIES}.items():
        config, length = small(memory, tiny), 64 if tiny else 512
        torch.manual_seed(0)
        batch = read(memory, 4, length, 256)
        results = []
        wide = torch.float32
        for device, dtype in ((torch.device("cpu"), wide), (DEVICE, wide), (DEVICE, HALF)):
            model = Decoder(config)
            initialise(model, config, 0)
            model.to(device, dtype)
            scale = torch.tensor(1.0 / (4 * length), device=device)
            tokens, starts, labels = (
                x.to(device) for x in (batch.tokens, batch.starts, batch.labels)
            )
            output = model(tokens, starts, None, labels=labels, scale=scale)
            output.loss.backward()
            grads = [
                p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None
            ]
            results.append((output.loss, torch.cat(grads)))
        host, full, half = results
        cells = [error(x, y) for own in (full, half) for x, y in zip(own, host, strict=True)]
        yield [name, *(f"{cell:.1e}" for cell in cells)]


LAYERS = 6
"""Of an 8B model's, with its embeddings and optimizer: what one GPU of 80 GB holds."""


def step(tiny: bool) -> Table:
    """A training step of the 8B shape with fewer layers: tokens/s, MFU, memory."""
    yield ["memory", "tokens a sample", "compiled", "checkpointing", "tokens/s", "MFU", "GiB"]
    shape = {"num_layers": LAYERS, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8,
             "ffn_size": 14336, "vocab_size": 128256, "tie_embeddings": False}  # fmt: skip
    if tiny:
        shape |= {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2,
                  "ffn_size": 128, "vocab_size": 256}  # fmt: skip
    start_processes(timedelta(minutes=10))
    for length in (256, 512) if tiny else (8192, 32768, 131072):
        for name, compiled in (("none", True), ("none", False), ("window", True), ("fam", True)):
            segment = length if name == "none" else min(2048, length // 4)
            yield one_step(name, shape, length, segment, compiled)


def one_step(
    name: str, shape: dict[str, Any], length: int, segment: int, compiled: bool
) -> list[str]:
    """Return a row of `step`."""
    more = {"none": {}, "window": {"segments": 1}, "fam": {"slots": 64, "window": 1}}
    memory: dict[str, Any] = {"name": name, **more[name]}
    checkpointing = "selective" if length <= 32768 else "block"
    config = validate(
        {
            "name": "gpu",
            "model": {**shape, "memory": memory},
            "data": {"train": "-", "segment_len": segment, "sample_len": length},
            "parallel": {"tp": 1, "cp": 1, "zero": 1},
            "train": {
                "steps": 1000, "batch_size": 1, "micro_batch": 1, "lr": 1e-4, "precision": "bf16",
                "schedule": "constant", "warmup_steps": 0, "checkpointing": checkpointing,
                "compile": compiled,
            },
        }
    )  # fmt: skip
    gc.collect()  # the row before: its engine and its optimizer know each other
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    mesh = build_mesh(tp=1, cp=1)
    vocab = int(shape["vocab_size"])
    model = to_model_config(config, vocab)
    built, state = build(config, model, mesh), TrainState()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def run() -> None:
        ids = torch.randint(0, vocab, (1, length // segment, segment))
        starts = torch.zeros(ids.shape[:2], dtype=torch.bool)
        offsets = torch.zeros(1, dtype=torch.int64)
        batch = Batch(ids, ids.roll(-1, -1), starts, offsets, first_position=state.step)
        state.memory.clear()
        next(train_steps(config, built, mesh, state, [[batch]]))

    try:
        tokens_per_s = length / seconds(run, 3)
    except torch.OutOfMemoryError:
        return [name, f"{length:,}", str(compiled), checkpointing, "out of memory", "", ""]
    share = mfu(
        tokens_per_s, training_flops_per_token(model, segment), peak_flops(DEVICE, "bf16"), 1
    )
    held = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    return [name, f"{length:,}", str(compiled), checkpointing, f"{tokens_per_s:,.0f}",
            f"{share:.1%}", f"{held:.1f}"]  # fmt: skip


def grouped(tiny: bool) -> Table:
    """Landmark's attention beside plain causal attention, forward and backward."""
    yield ["tokens", "plain, ms", "grouped, ms", "times"]
    for length in (128,) if tiny else (4096, 8192, 32768):
        shapes = [(1, heads, length, 128) for heads in (32, 8, 8, 32)]
        q, k, v, dout = (torch.randn(shape, device=DEVICE, dtype=HALF) for shape in shapes)
        took = [
            seconds(both_ways(kernel, q, k, v, dout), 5)
            for kernel in (choose_kernel(q), choose_grouped(q, 64))
        ]
        cells = [f"{1e3 * each:.2f}" for each in took]
        yield [f"{length:,}", *cells, f"{took[1] / took[0]:.2f}"]


def diagonals(tiny: bool) -> Table:
    """Armt read and trained segment after segment, and by train.wavefront: tokens/s."""
    yield ["segment", "segments", "pass", "in turn", "diagonals", "times"]
    shape = (2, 64, 4, 2, 128, 16) if tiny else (16, 2048, 16, 4, 5632, 128)
    config = ModelConfig(32000, *shape, memory=ArmtMemory(16, 64))
    models = []
    for wavefront in (False, True):
        with DEVICE:
            models.append(Decoder(config, compute=ComputeConfig("block", wavefront=wavefront)))
        initialise(models[-1], config, 0)
        models[-1].to(HALF)
    for length, count in ((16, 3),) if tiny else ((512, 64), (1024, 32), (2048, 16)):
        tokens = torch.randint(0, 32000, (1, count, length), device=DEVICE)
        starts = torch.zeros(1, count, dtype=torch.bool, device=DEVICE)
        for name, run in (("read", Decoder.read), ("trained", train_once)):
            took = [seconds(functools.partial(run, model, tokens, starts), 5) for model in models]
            rates = [f"{tokens.numel() / each:,.0f}" for each in took]
            yield [f"{length:,}", str(count), name, *rates, f"{took[0] / took[1]:.2f}"]


def train_once(model: Decoder, tokens: Tensor, starts: Tensor) -> None:
    """Go forward and backward."""
    scale = torch.tensor(1 / tokens.numel(), device=DEVICE)
    model(tokens, starts, labels=tokens, scale=scale).loss.backward()
    model.zero_grad()


def both_ways(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], None]:
    """Return forward and backward of a kernel."""

    def run() -> None:
        out, lse = kernel.forward(q, k, v, True)
        kernel.backward(dout, q, k, v, out, lse, True)

    return run


class Copied(Ring):
    """A rank of a ring on one GPU: each hop is a copy on a stream of its own, beside computing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.side = torch.cuda.Stream() if DEVICE.type == "cuda" else None

    def pass_on(self, x: Tensor) -> Hop:
        """Return a copy of x, under way."""
        if self.side is None:
            return Hop(x, x.clone(), [])
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            received = x.clone()
        return Hop(x, received, [Copying(self.side)])


class Copying:
    """What a stream does, to be waited for as a message is."""

    def __init__(self, side: torch.cuda.Stream) -> None:
        self.side = side

    def wait(self) -> None:
        """Let what is computed from now on come behind it."""
        torch.cuda.current_stream().wait_stream(self.side)


def ring(tiny: bool) -> Table:
    """Each rank's share of a ring of two by zigzag, beside half of one call over everything."""
    yield ["tokens", "whole, ms", "rank 0, ms", "rank 1, ms", "half of whole / slower rank"]
    for length in (256,) if tiny else (16384, 65536, 131072):
        shapes = [(1, 1, length, heads, 128) for heads in (32, 8, 8, 32)]
        full = [torch.randn(shape, device=DEVICE, dtype=HALF) for shape in shapes]
        took = []
        for exchange in (Alone(), Copied(0, 2), Copied(1, 2)):
            took.append(seconds(attention(exchange, full), 5))
        cells = [f"{1e3 * each:.2f}" for each in took]
        yield [f"{length:,}", *cells, f"{took[0] / 2 / max(took[1:]):.2f}"]


def attention(exchange: Exchange, full: list[Tensor]) -> Callable[[], None]:
    """Return forward and backward over this rank's share of q, k, v and upstream."""
    layout = choose_layout("zigzag", exchange.size) if exchange.size > 1 else Whole()
    places = layout.positions(exchange.rank, full[0].shape[2]).to(DEVICE)
    q, k, v, upstream = (x[:, :, places].contiguous() for x in full)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sequence = FoldedSequence(layout, exchange)

    def run() -> None:
        torch.autograd.grad(sequence.fold(*leaves), leaves, upstream)

    return run


def streaming(tiny: bool) -> Table:
    """The next chunk behind ever more tokens: tokens/s, and what the GPU holds at the end.

    For each memory, and for the same model without one whose keys are all kept.
    """
    lengths = [256, 512] if tiny else [8192, 131072, 1048576]
    yield ["memory", *(f"{length:,}" for length in lengths), "GiB at the end"]
    chunk = 64 if tiny else 2048
    for name, memory in {**MEMORIES, "none, all keys": NoMemory()}.items():
        marked = isinstance(memory, LandmarkMemory)
        config = ModelConfig(
            32000 + marked,
            *((2, 64, 4, 2, 128, 16) if tiny else (8, 2048, 16, 4, 5632, 128)),
            memory=memory,
        )
        with DEVICE:
            model = Decoder(config)
        initialise(model, config, 0)
        model.to(HALF)
        take = with_keys(model, lengths[-1]) if isinstance(memory, NoMemory) else with_state(model)
        cells, done = [], 0
        for length in lengths:
            took: list[float] = []
            while done < length:
                tokens = read(memory, 1, chunk, 32000).tokens.to(DEVICE)
                _wait()
                began = time.perf_counter()
                take(tokens)
                _wait()
                took.append(time.perf_counter() - began)
                done += chunk
            cells.append(f"{chunk / statistics.median(took[-15:]):,.0f}")
        held = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
        yield [name, *cells, f"{held:.2f}"]
        del model, take
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def with_state(model: Decoder) -> Callable[[Tensor], None]:
    """Return what reads the next segments [B, N, S] of a document into the model's memory."""
    state: Carried | None = None

    def take(tokens: Tensor) -> None:
        nonlocal state
        starts = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        state = model.read(tokens, starts, state)  # a stream of no state begins a document

    return take


def with_keys(model: Decoder, most: int) -> Callable[[Tensor], None]:
    """Return what reads the next tokens and keeps their keys, up to `most` of them."""
    stream = Stream(model, most + 1)  # one segment, never complete

    def take(tokens: Tensor) -> None:
        stream.read(tokens.flatten(1))

    return take


PARTS: dict[str, Callable[[bool], Table]] = {
    part.__name__: part for part in (kernels, memories, step, grouped, diagonals, ring, streaming)
}


def main() -> None:
    """Run the parts, each in its own process, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        for number, row in enumerate(PARTS[options.part](options.tiny)):
            print(f"| {' | '.join(row)} |", flush=True)
            if number == 0:
                print("| --- " * len(row) + "|", flush=True)
        return
    if DEVICE.type != "cuda" and not options.tiny:
        parser.error("no GPU here; --tiny shows on a CPU that the command works")
    options.output.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "a CPU: numbers mean nothing"
    failed = []
    with (options.output / "gpu.md").open("w", encoding="utf-8") as report:
        print(f"# {name}, torch {torch.__version__}", file=report)
        for part in options.parts.split(","):
            began = time.monotonic()
            words = [sys.executable, "-m", "benchmarks.gpu", "--part", part]
            words += ["--tiny"] * options.tiny
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            said = done.stdout if done.returncode == 0 else f"{done.stdout}\n{done.stderr[-3000:]}"
            failed += [part] * bool(done.returncode)
            text = (
                f"\n## {part} ({time.monotonic() - began:.0f} s)\n\n{PARTS[part].__doc__}\n\n{said}"
            )
            print(text, file=report, flush=True)
            print(text, flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
