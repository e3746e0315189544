"""A training step of the 8B shape, with as many layers as the GPU has room for."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Iterator
from collections.abc import Sequence as Items
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.measure import (
    DEVICE,
    Options,
    Row,
    Table,
    attempt,
    forget,
    peak_gib,
    reserved_gib,
    times,
)
from data.streams import Batch
from model.config import ModelConfig
from parallel.mesh import build_mesh, start_processes
from train.build import build, to_model_config
from train.loop import TrainState, train_steps
from train.planning.expect import expect, gpu_name
from train.planning.plan import Plan
from train.settings.config import Config, validate
from train.speed.metrics import mfu, peak_flops, training_flops_per_token

SHAPE = {"hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8, "ffn_size": 14336,
         "vocab_size": 128256, "tie_embeddings": False}  # fmt: skip
TOY = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 128,
       "vocab_size": 256, "tie_embeddings": False}  # fmt: skip
MEMORIES: dict[str, dict[str, Any]] = {
    "none": {},
    "window": {"segments": 1},
    "fam": {"slots": 64, "window": 1},
}
TOKENS = 65536
"""Of a step, at least: the optimizer's share is then about that of a run."""

SEGMENT = 2048
MOST, FEWEST = 32, 4
"""Layers: an 8B model's, and those from which on nothing more is recomputed to fit more."""

TOO_LARGE = "out of memory"
ROOM = 0.92
"""Of the free memory, for what the plan says: it has not been held against a GPU yet."""

WAYS: list[dict[str, Any]] = [
    {"checkpointing": "selective"},
    {"checkpointing": "selective", "ffn_chunk": 8192},
    {"checkpointing": "block", "ffn_chunk": 8192},
]
"""How much is recomputed or cut, least first."""


class Case(NamedTuple):
    """What a row is of."""

    memory: str
    length: int  # tokens of a sample
    layers: int
    way: dict[str, Any]
    kernels: str  # compiled, fp8 (compiled too), eager
    tiny: bool

    @property
    def kind(self) -> list[str]:
        """The first cells of its row."""
        way = ", ".join(f"{key} {value}" for key, value in self.way.items())
        return [self.memory, f"{self.length:,}", str(self.lanes), str(self.layers),
                self.kernels, way]  # fmt: skip

    @property
    def lanes(self) -> int:
        """Samples of a step."""
        return 1 if self.tiny else max(1, TOKENS // self.length)

    @property
    def loss_chunk(self) -> int:
        """Rows: few where logits are held in float32, many where a kernel reads them once."""
        return 1024 if self.kernels == "eager" else min(self.length, 8192)

    def config(self) -> Config:
        """Return the run of one rank: one sample in each forward pass."""
        segment = self.length if self.memory == "none" else min(SEGMENT, self.length // 4)
        memory = {"name": self.memory, **MEMORIES[self.memory]}
        shape = TOY if self.tiny else SHAPE
        return validate(
            {
                "name": "gpu",
                "model": {**shape, "num_layers": self.layers, "memory": memory},
                "data": {"train": "-", "segment_len": segment, "sample_len": self.length},
                "parallel": {"tp": 1, "cp": 1, "zero": 1},
                "train": {
                    "steps": 1000, "batch_size": self.lanes, "micro_batch": 1, "lr": 1e-4,
                    "precision": "bf16", "schedule": "constant", "warmup_steps": 0,
                    "loss_chunk": self.loss_chunk, "fp8": self.kernels == "fp8",
                    # a CPU takes minutes for it
                    "compile": self.kernels != "eager" and DEVICE.type == "cuda", **self.way,
                },
            }
        )  # fmt: skip

    def plan(self) -> Plan:
        """Return what `longhaul plan` says of it."""
        return expect(self.config(), 0, 1, gpu_name())


def step_8k(options: Options) -> Table:
    """A training step of the 8B shape: samples of 8,192 tokens.

    Forward, backward and AdamW, 65,536 tokens and more a step. All rows of a length have the same
    layers, the most that the plan says fit whatever the memory. MFU counts causal attention and no
    recomputation, and is of bfloat16's peak; the head's share of these FLOPs is larger than in 32
    layers (6 % at 8,192). In brackets what `longhaul plan` expects, in bfloat16. In FP8 asked are
    1.3 times the tokens/s of the row in bfloat16.
    """
    return steps(options, 256 if options.tiny else 8192, others=["fp8", "eager"])


def step_32k(options: Options) -> Table:
    """Like step_8k: samples of 32,768 tokens."""
    return steps(options, 512 if options.tiny else 32768)


def step_128k(options: Options) -> Table:
    """Like step_8k: samples of 131,072 tokens."""
    return steps(options, 1024 if options.tiny else 131072)


def steps(options: Options, length: int, others: Items[str] = ()) -> Table:
    """Yield a row for each memory, compiled; then the same otherwise: in FP8 too, or eager."""
    yield ["memory", "tokens a sample", "samples", "layers", "kernels", "recomputed", "step, s",
           "tokens/s", "MFU (planned)", "head's share", "GiB, reserved (planned)",
           "loss"]  # fmt: skip
    start_processes(timedelta(minutes=10))
    free = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else 0
    layers, way = fitting(length, free, options.tiny)
    for kernels in ["compiled", *others]:
        for memory in MEMORIES:
            case = Case(memory, length, layers, way, kernels, options.tiny)
            clear()
            row = attempt(case.kind, functools.partial(measured, case, options.rounds))
            if row[-1] == TOO_LARGE and layers > 1:  # the plan was wrong: once more, with fewer
                yield row
                layers = layers * 3 // 4
                case = case._replace(layers=layers)
                clear()
                row = attempt(case.kind, functools.partial(measured, case, options.rounds))
            yield row


def clear() -> None:
    """Forget the row before: its engine and its optimizer know each other."""
    gc.collect()
    forget()


def fitting(length: int, free: int, tiny: bool) -> tuple[int, dict[str, Any]]:
    """Return as many layers as fit beside every memory, and what is recomputed for them."""
    layers, way = 2, WAYS[-1]
    for way in [] if tiny else WAYS:
        layers = max(fits(length, way, free), default=1)
        if layers >= FEWEST:
            break
    return layers, way


def fits(length: int, way: dict[str, Any], free: int) -> Iterator[int]:
    """Yield the numbers of layers for which the plan has room."""
    for layers in range(1, MOST + 1):
        cases = [Case(memory, length, layers, way, "compiled", False) for memory in MEMORIES]
        if any(case.plan().memory.total > ROOM * free for case in cases):
            return
        yield layers


def measured(case: Case, rounds: int) -> Row:
    """Return a row's cells; of a step that does not fit, one that says so."""
    config, plan = case.config(), case.plan()
    model = to_model_config(config, 0)
    flops = training_flops_per_token(model, config.data.segment_len)
    head = 6.0 * model.hidden_size * model.vocab_size / flops
    planned = f"{plan.memory.total / 2**30:.1f}"
    try:
        step_s, loss = step_seconds(config, model, rounds)
    except torch.OutOfMemoryError:
        return [TOO_LARGE]
    tokens_per_s = case.lanes * case.length / step_s
    share = mfu(tokens_per_s, flops, peak_flops(DEVICE, "bf16"), 1)
    return [f"{step_s:.2f}", f"{tokens_per_s:,.0f}", f"{share:.1%} ({plan.mfu:.1%})",
            f"{head:.1%}", f"{peak_gib():.1f}, {reserved_gib():.1f} ({planned})",
            f"{loss:.4f}"]  # fmt: skip


def step_seconds(config: Config, model: ModelConfig, rounds: int) -> tuple[float, float]:
    """Return the seconds of a step as `longhaul pretrain` does it, without reading data.

    And the first step's loss: that of the same weights and tokens for all kernels. Raises
    RuntimeError where a loss or gradient is not finite: the optimizer then does nothing.
    """
    torch.manual_seed(0)
    mesh = build_mesh(tp=1, cp=1)
    built, state = build(config, model, mesh), TrainState()
    size = config.data.segment_len

    def sample() -> Batch:
        ids = torch.randint(0, model.vocab_size, (1, config.data.sample_len + 1))
        starts = torch.zeros(1, config.num_segments, dtype=torch.bool)
        tokens, labels = (x.reshape(1, -1, size) for x in (ids[:, :-1], ids[:, 1:]))
        offsets = torch.zeros(1, dtype=torch.int64)
        return Batch(tokens, labels, starts, offsets, first_position=state.step)

    batches = [sample() for _ in range(config.train.batch_size)]

    losses: list[float] = []

    def run() -> None:
        state.memory.clear()  # each sample a document of its own
        result = next(train_steps(config, built, mesh, state, [batches]))
        if result.grad_norm is None or not math.isfinite(result.loss):
            raise RuntimeError(f"a step is not finite: {result}")
        losses.append(result.loss)

    return times(run, rounds).median, losses[0]
