"""What goes segment after segment: a memory's chain inside a layer, and layers on diagonals."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import (
    DEVICE,
    HALF,
    Options,
    Row,
    Run,
    Table,
    as_graph,
    attempt,
    forget,
    times,
)
from benchmarks.gpu.models import EIGHT_B, MIDDLE, TOY, VOCAB, Sizes, on_device, shape
from model.compiled import use_compiled
from model.config import (
    AbcMemory,
    ArmtMemory,
    ComputeConfig,
    FamMemory,
    InfiniMemory,
    MemoryConfig,
    WindowMemory,
)
from model.decoder import Decoder
from model.memory.base import map_tensors
from model.memory.window import read_tokens

CHAINS: dict[str, MemoryConfig] = {
    "fam": FamMemory(64, 1),
    "abc": AbcMemory(64, 1),
    "infini": InfiniMemory(window=1),
}


def chain(options: Options) -> Table:
    """What a memory computes from segment to segment, as a share of its layer.

    One layer of the 8B shape, 64 slots and a window of one segment, 32,768 tokens of one document,
    forward and backward. chain: what each segment leaves and the next ones read, alone. Asked of
    fam: at most 5 % of the layer. The same layer with its window alone stands beside it, and the
    chain's forward and backward as one CUDA graph: what there is to gain by that.
    """
    yield ["memory", "segment", "segments", "compiled", "window alone, ms", "layer, ms",
           "chain, ms", "chain / layer (asked 0.05)", "as a graph, ms"]  # fmt: skip
    sizes = (1, *TOY[1:]) if options.tiny else EIGHT_B
    tokens = 256 if options.tiny else 32768
    for compiled in (False,) if DEVICE.type == "cpu" else (True, False):
        use_compiled(compiled)
        for length in (64, 128) if options.tiny else (2048, 8192):
            for name, memory in CHAINS.items():
                kind = [name, f"{length:,}", str(tokens // length), "yes" if compiled else "no"]
                yield attempt(
                    kind,
                    functools.partial(
                        share_of_chain, sizes, memory, length, tokens // length, options.rounds
                    ),
                )
                forget()
    use_compiled(False)


def share_of_chain(sizes: Sizes, memory: MemoryConfig, length: int, count: int, rounds: int) -> Row:
    """Return the cells of `chain`."""
    plain, _ = layer_and_chain(sizes, WindowMemory(1), length, count)
    layer, alone = layer_and_chain(sizes, memory, length, count)
    took = [times(run, rounds) for run in (plain, layer, alone)]
    share = f"{took[2].median / took[1].median:.3f}"
    graph = attempt([], lambda: [times(as_graph(alone), rounds).ms])
    return [*(each.ms for each in took), share, *graph]


def layer_and_chain(sizes: Sizes, memory: MemoryConfig, length: int, count: int) -> tuple[Run, Run]:
    """Return forward and backward of a layer, and of its memory's chain alone."""
    model = on_device(shape(sizes, memory, 256))
    block = model.layers()[0]
    starts = torch.zeros(1, count, dtype=torch.bool, device=DEVICE)
    ids = torch.zeros(1, count, length, dtype=torch.int64, device=DEVICE)
    segments = model.segments(ids, starts, fresh=True)
    x = torch.randn(count * length, sizes[1], device=DEVICE, dtype=HALF, requires_grad=True)
    with torch.no_grad():
        initial = model.memory.initial(model.layers(), model.linears)[0]
        before = model.empty(segments).layers[0]
        tokens, _ = read_tokens(block, x, segments, before.window)
    tokens = map_tensors(lambda t: t.detach().requires_grad_(t.is_floating_point()), tokens)
    of_layer, of_chain = [x, *block.parameters()], [*leaves(tokens), *block.parameters()]

    def layer() -> None:
        out, _, _ = block(x, None, segments, before, initial)
        backward([out], of_layer)

    def alone() -> None:
        for name, part in block.mixer.parts.items():
            read, after = part.chain(block, segments, tokens, before.parts[name], initial[name])
            backward([*leaves(read), *leaves(after)], of_chain)

    return layer, alone


def leaves(state: Any) -> list[Tensor]:
    """Return the tensors of a state that have gradients."""
    found: list[Tensor] = []

    def look(tensor: Tensor) -> Tensor:
        found.extend([tensor] if tensor.requires_grad else [])
        return tensor

    map_tensors(look, state)
    return found


def backward(outputs: list[Tensor], inputs: list[Tensor]) -> None:
    """Compute the gradients; the upstream one is the output itself, so that none is drawn."""
    upstream = [x.detach() for x in outputs]
    torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)


def diagonals(options: Options) -> Table:
    """Armt read and trained segment after segment, and by train.wavefront: tokens/s."""
    yield ["segment", "segments", "pass", "in turn", "diagonals", "times"]
    config = shape(TOY if options.tiny else (16, *MIDDLE[1:]), ArmtMemory(16, 64))
    models = [
        on_device(config, ComputeConfig("block", wavefront=wavefront))
        for wavefront in (False, True)
    ]
    for length, count in ((16, 3),) if options.tiny else ((512, 64), (1024, 32), (2048, 16)):
        tokens = torch.randint(0, VOCAB, (1, count, length), device=DEVICE)
        starts = torch.zeros(1, count, dtype=torch.bool, device=DEVICE)
        for name, run in (("read", Decoder.read), ("trained", train_once)):
            runs = [functools.partial(run, model, tokens, starts) for model in models]
            make = functools.partial(rates, runs, tokens.numel(), options.rounds)
            yield attempt([f"{length:,}", str(count), name], make)


def rates(runs: list[Run], tokens: int, rounds: int) -> Row:
    """Return tokens/s of each, and how much faster the second one is."""
    took = [times(run, rounds).median for run in runs]
    return [*(f"{tokens / each:,.0f}" for each in took), f"{took[0] / took[1]:.2f}"]


def train_once(model: Decoder, tokens: Tensor, starts: Tensor) -> None:
    """Go forward and backward."""
    scale = torch.tensor(1 / tokens.numel(), device=DEVICE)
    model(tokens, starts, labels=tokens, scale=scale).loss.backward()
    model.zero_grad()
