"""Whether the device computes what the host does in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.measure import (
    DEVICE,
    HALF,
    Error,
    Options,
    Row,
    Table,
    attempt,
    difference,
    named,
)
from benchmarks.gpu.models import document, shape
from benchmarks.gpu.tolerances import FP8, FP8_TWIN, GRADIENTS, KERNELS, LOSS, LSE, WEIGHTS
from benchmarks.length import MEMORIES
from data.streams import Batch
from model.compiled import use_compiled
from model.config import ModelConfig, NoMemory
from model.decoder import Decoder
from model.float8 import float8_product
from model.init import initialise
from model.kernels import Blockwise, choose_kernel
from model.memory.grouped import choose_grouped
from model.memory.grouped_softmax import GroupedSoftmax

HOST = torch.device("cpu")


def kernels(options: Options) -> Table:
    """Relative error of each kernel against its slow twin in float64 on the host."""
    yield ["attention", "type", "head_dim", "kernel", "out", "lse", "dq", "dk", "dv"]
    length, block = (128, 16) if options.tiny else (2048, 64)
    for head_dim in (64, 128):
        for name in ("plain", "grouped"):
            for dtype in (torch.float32, HALF):
                slow: Any = Blockwise() if name == "plain" else GroupedSoftmax(block)
                make = functools.partial(compare, slow, name, dtype, head_dim, length, block)
                yield attempt([name, named(dtype), str(head_dim)], make)


def fp8(options: Options) -> Table:
    """Relative error of the three FP8 products against bfloat16's, and against the host's FP8.

    Rounding to four bits leaves 3e-2 to 4e-2 of normal numbers. Rows are no multiple of 16 once,
    many once (the weight's gradient sums over them). "outlier": one row is 4096 times the others;
    errors are of the others, but for the weight's gradient, which is mostly that row's.
    """
    yield ["rows", "compiled", "of bfloat16's: result", "of x", "of weight",
           "of the host's: result", "of x", "of weight"]  # fmt: skip
    few, many, *features = (37, 256, 64, 48) if options.tiny else (2047, 65536, 1024, 2816)
    for rows, outlier in ((few, False), (few, True), (many, False)):
        generator = torch.Generator().manual_seed(0)
        shapes = ((rows, features[0]), (features[1], features[0]), (rows, features[1]))
        given = [torch.randn(shape, generator=generator).to(HALF) for shape in shapes]
        if outlier:
            given[0][0] *= 2.0**12
        for on in (False, True):
            kind = [f"{rows}{', outlier' * outlier}", "yes" if on else "no"]
            yield attempt(kind, functools.partial(compare_fp8, given, outlier, on))
            use_compiled(False)


def compare_fp8(given: list[Tensor], outlier: bool, compiled: bool) -> Row:
    """Return the errors of a row of `fp8`; the host's twin is plain torch, without a compiler."""
    here = [x.to(DEVICE) for x in given]
    plain, host = products(functional.linear, here), products(float8_product, given)
    use_compiled(compiled)
    own = products(float8_product, here)
    return [
        Error(difference(mine[first:], theirs[first:]), limit)
        for others, limit in ((plain, FP8), (host, FP8_TWIN))
        for mine, theirs, first in zip(own, others, (outlier, outlier, 0), strict=True)
    ]


def products(product: Callable[[Tensor, Tensor], Tensor], given: list[Tensor]) -> list[Tensor]:
    """Return a map's result and its two gradients."""
    x, weight = (each.detach().clone().requires_grad_() for each in given[:2])
    out = product(x, weight)
    return [out, *torch.autograd.grad(out, (x, weight), given[2])]


def compare(
    slow: Any, name: str, dtype: torch.dtype, head_dim: int, length: int, block: int
) -> Row:
    """Return a row of `kernels`."""
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(1, heads, length, head_dim, generator=generator).to(dtype)
        for heads in (8, 2, 2, 8)
    ]
    here, wide = [x.to(DEVICE) for x in given], [x.double() for x in given]
    fast: Any = choose_grouped(here[0], block) if name == "grouped" else choose_kernel(here[0])
    found = []
    for kernel, (q, k, v, dout) in ((slow, wide), (fast, here)):
        out, lse = kernel.forward(q, k, v, True)
        found.append([out, lse, *kernel.backward(dout, q, k, v, out, lse, True)])
    limits = [KERNELS[dtype], LSE] + [KERNELS[dtype]] * 3
    errors = [
        Error(difference(own, other), limit)
        for other, own, limit in zip(*found, limits, strict=True)
    ]
    return [type(fast).__name__, *errors]


def memories(options: Options) -> Table:
    """Relative error of each memory's loss and gradients against the host in float64."""
    yield ["memory", "loss, float32", "worst weight's gradient, float32", "loss, bfloat16",
           "gradients, bfloat16"]  # fmt: skip
    for name, memory in {"none": NoMemory(), **MEMORIES}.items():
        config = shape((2, 64 if options.tiny else 256, 4, 2, 128, 16), memory, 256)
        torch.manual_seed(0)
        batch = document(memory, 4, 64 if options.tiny else 512, 256)
        wide = trained(config, batch, HOST, torch.float64)
        run = functools.partial(errors_of, config, batch, wide)
        yield attempt([name], run)
        if name == "fam" and DEVICE.type == "cuda":
            use_compiled(True)
            yield attempt([f"{name}, compiled"], run)
            use_compiled(False)


def errors_of(config: ModelConfig, batch: Batch, wide: Trained) -> Row:
    """Return the errors of loss and gradients on the device, in each type."""
    found: Row = []
    for dtype in (torch.float32, HALF):
        own = trained(config, batch, DEVICE, dtype)
        found.append(Error(difference(own.loss, wide.loss), LOSS[dtype]))
        whole, other = (torch.cat(list(x.grads.values())) for x in (own, wide))
        worst = difference(whole, other)
        if dtype == torch.float32:
            least = 1e-6 * float(other.norm())  # what is 0 but for rounding has no relative error
            worst = max(
                float((own.grads[name] - grad).norm()) / max(float(grad.norm()), least)
                for name, grad in wide.grads.items()
            )
        found.append(Error(worst, WEIGHTS if dtype == torch.float32 else GRADIENTS))
    return found


class Trained(NamedTuple):
    """What a forward and a backward gave."""

    loss: Tensor
    grads: dict[str, Tensor]  # of each weight that has one, flat, float64 on the host


def trained(config: ModelConfig, batch: Batch, device: torch.device, dtype: torch.dtype) -> Trained:
    """Return the loss of the first weights, and their gradients."""
    model = Decoder(config)
    initialise(model, config, 0)
    model.to(device, dtype)
    tokens, starts, labels = (x.to(device) for x in (batch.tokens, batch.starts, batch.labels))
    scale = torch.tensor(1.0 / batch.labels.numel(), device=device)
    output = model(tokens, starts, None, labels=labels, scale=scale)
    output.loss.backward()
    grads = {
        name: p.grad.flatten().double().cpu()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return Trained(output.loss, grads)
