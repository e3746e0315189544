"""Throughput that can be compared: FLOPs a token needs, and what the machine could do.

Counted is what the mathematics asks for: causal attention as half a square, no recomputation
(checkpointing costs time and earns nothing here), no padding of the vocabulary. Left out, each
far below a percent: norms, RoPE, softmax, the optimizer, the prompt's way through the layers.
"""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

import torch

from model.config import LandmarkMemory, ModelConfig
from model.lora import count_adapters
from train.speed.memory_flops import block_costs, memory_flops

FORMULA_NAME = "causal mask-aware, no recomputation"

FORMULA = (
    "FLOPs/token = 3 x forward; forward = 2 x P + 4 x layers x heads x head_dim x keys + memory;"
    " P: parameters of all matrices outside the memory, head included, embedding lookup and"
    " vocabulary padding not; keys: (S + 1) / 2 of the own segment + S of each window segment"
    " (packed: the mean over an epoch of those that attention reads) + those a token reads of the"
    " memory (slots, rows, retrieved blocks; with landmark's layers: last, window and blocks in one"
    " layer alone); memory: its own rows through all blocks (fam slots / S a token, rmt 2 x slots /"
    " S, armt slots / S, hmt (sensory + 3) / S and the summary of half a segment) with the keys"
    " they read, and its products:"
    " reads and writes of matrices (infini, armt), scores and writes of slots (abc, cmab), the"
    " search (hmt). Landmarks are tokens. With model.lora, P has the adapters too, and tokens count"
    " 2 x, not 3 x, forward in matrices that are frozen: those have no gradient of their own."
)
"""In words, for run tags and the end of a run. S: segment_len."""


class Flops(NamedTuple):
    """FLOPs of one token's forward pass, a multiply-add counted as 2."""

    matrices: float  # tokens through QKV, output, FFN and head
    attention: float  # tokens' scores and weighted sums
    memory: float  # the memory's own rows and products; see train.speed.memory_flops


def forward_flops_per_token(
    model: ModelConfig, segment_len: int, keys: float | None = None
) -> Flops:
    """Return what one token of a full segment costs, far enough in its document.

    There all window segments exist; in a document's first segments, which have none, the same
    cost is counted. segment_len is that of all ranks, in tokens. keys: those of segment and window
    that a token reads where segments are packed (PackedStreams.keys_per_token).
    """
    costs = block_costs(model)
    memory = memory_flops(model, model.memory, segment_len)
    beyond = memory.keys
    if keys is None:
        keys = (segment_len + 1) / 2
        beyond += model.window * segment_len
    if isinstance(model.memory, LandmarkMemory) and model.memory.layers == "last":
        beyond /= model.num_layers
    head = 2.0 * model.hidden_size * model.vocab_size
    matrices = costs.row + head + 2.0 * count_adapters(model)
    return Flops(matrices, costs.key * (keys + beyond), memory.flops)


def training_flops_per_token(
    model: ModelConfig, segment_len: int, keys: float | None = None
) -> float:
    """Return the FLOPs of one token in training: forward once, backward twice as much.

    In frozen matrices backward is as much as forward.
    """
    frozen = 0.0
    if model.lora is not None:
        head = 2.0 * model.hidden_size * model.vocab_size
        frozen = block_costs(model).row + (0.0 if "embeddings" in model.lora.train_also else head)
    return 3 * sum(forward_flops_per_token(model, segment_len, keys)) - frozen


Precision = Literal["fp32", "bf16"]


class Peak(NamedTuple):
    """What one device could do in matrix products, and how that is known."""

    flops_per_s: float
    source: str


class _Gpu(NamedTuple):
    name: str  # all its words stand in the device's name
    bf16: float  # TFLOP/s, dense
    tf32: float
    fp32: float  # without tensor cores


# NVIDIA's data sheets; where they give sparse numbers, half of them. More words come first: the
# first entry whose words are all in the device's name is taken.
_GPUS = (
    _Gpu("GB200", 2500, 1250, 80),
    _Gpu("B200", 2250, 1125, 75),
    _Gpu("GH200", 989.5, 494.7, 67),
    _Gpu("H200 NVL", 835.5, 417.5, 60),
    _Gpu("H200", 989.5, 494.7, 67),
    _Gpu("H100 NVL", 835.5, 417.5, 60),
    _Gpu("H100 PCIe", 756.5, 378, 51),
    _Gpu("H100", 989.5, 494.7, 67),
    _Gpu("H800", 989.5, 494.7, 67),
    _Gpu("H20", 148, 74, 44),
    _Gpu("A100", 312, 156, 19.5),
    _Gpu("A800", 312, 156, 19.5),
    _Gpu("L40S", 362, 183, 91.6),
)


def peak_flops(device: torch.device, precision: Precision) -> Peak:
    """Return the peak of one device: from the table of GPUs, else measured here.

    fp32 on a GPU is TF32 where torch may use it. A measured peak is what this process gets
    while others run: call it on all ranks at once, and ranks that share cores each measure
    their share. Takes under 0.5 s on a CPU.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = listed_peak(name, precision, tf32=torch.backends.cuda.matmul.allow_tf32)
        if known is not None:
            return known
    return measure_peak(device, precision)


def listed_peak(name: str, precision: Precision, *, tf32: bool) -> Peak | None:
    """Return the data sheet's dense peak of a GPU, None for one that is not in the table."""
    words = set(name.replace("-", " ").split())  # "A100-SXM4-80GB" is three words
    if "MIG" in words:  # a part of the GPU
        return None
    for gpu in _GPUS:
        if words.issuperset(gpu.name.split()):
            kind = "bf16" if precision == "bf16" else "tf32" if tf32 else "fp32"
            return Peak(getattr(gpu, kind) * 1e12, f"{name} data sheet, {kind} dense")
    return None


_BUDGET_S = 0.25


def measure_peak(device: torch.device, precision: Precision) -> Peak:
    """Return the best rate of a square matrix product in this process."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 1024 if device.type == "cpu" else 8192
    begin = time.perf_counter()
    rate = _matmul_rate(256, dtype, device)
    # A CPU without bfloat16 instructions may take a second for one large product.
    while size > 256 and 4.0 * size**3 / rate > _BUDGET_S:
        size //= 2
    rate = 0.0
    while rate == 0.0 or time.perf_counter() - begin < _BUDGET_S:
        rate = max(rate, _matmul_rate(size, dtype, device))
    return Peak(rate, "measured matmul")


def _matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return FLOP/s of the better of two products [size, size] x [size, size]."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    best_s = float("inf")
    for _ in range(2):
        _wait(device)
        begin = time.perf_counter()
        torch.mm(a, a, out=out)
        _wait(device)
        best_s = min(best_s, time.perf_counter() - begin)
    return 2.0 * size**3 / max(best_s, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mfu(tokens_per_s: float, flops_per_token: float, peak: Peak, ranks: int) -> float:
    """Return the model FLOPs utilization: 1.0 is `ranks` devices at their peak.

    tokens_per_s is that of the whole run, tokens counted once whatever TP and CP.
    """
    return tokens_per_s * flops_per_token / (peak.flops_per_s * ranks)
