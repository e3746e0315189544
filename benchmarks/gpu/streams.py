"""The next chunk of a long document: behind ever more tokens, and as one CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.measure import (
    DEVICE,
    Error,
    Options,
    Row,
    Run,
    Table,
    as_graph,
    attempt,
    difference,
    forget,
    peak_gib,
    times,
)
from benchmarks.gpu.models import MIDDLE, TOY, document, on_device, shape
from benchmarks.gpu.tolerances import GRAPHS
from benchmarks.length import MEMORIES, rewind
from model.config import MemoryConfig, NoMemory
from model.decoder import Decoder
from model.memory.base import Carried, map_tensors
from model.memory.in_turn import InTurn
from model.stream import Incremental, empty

AT_ONCE = 16
"""Segments of one call that reads on to the next length."""


def streaming(options: Options) -> Table:
    """The next chunk of 2048 tokens, with the logits of its last, behind ever more tokens.

    The same forward for all (what benchmarks.length times on a CPU): of each memory from the state
    that so many tokens left, and of the same model without one, whose keys of so many tokens
    (random ones) are all kept and read. Tokens/s, the rounds' spread, and the most GiB that tensors
    held meanwhile, weights with them.
    """
    lengths = [256, 512] if options.tiny else [8192, 131072, 1048576]
    header = [word for n in lengths for word in (f"{n:,}: tokens/s", f"{n:,}: GiB")]
    yield ["memory", *header, "last time / first"]
    chunk = 64 if options.tiny else 2048
    for name, memory in {**MEMORIES, "none, all keys": NoMemory()}.items():
        yield attempt([name], functools.partial(stream_lengths, memory, lengths, chunk, options))
        forget()


def stream_lengths(memory: MemoryConfig, lengths: list[int], chunk: int, options: Options) -> Row:
    """Return a memory's cells of `streaming`."""
    model = on_device(shape(TOY if options.tiny else MIDDLE, memory))
    if isinstance(memory, NoMemory):
        behind = (behind_keys(model, length, chunk) for length in lengths)
    else:
        behind = behind_state(model, memory, lengths, chunk)
    cells: Row = []
    took = []
    for run in behind:
        forget()
        each = times(run, options.rounds)
        took.append(each.median)
        cells += [f"{chunk / each.median:,.0f} ({each.spread:.0%})", f"{peak_gib():.3f}"]
        del run
    return [*cells, f"{took[-1] / took[0]:.2f}"]


def behind_state(
    model: Decoder, memory: MemoryConfig, lengths: list[int], chunk: int
) -> Iterator[Run]:
    """Yield, for each length, what reads the next chunk behind so many tokens."""
    state: Carried | None = None
    done = 0
    for length in lengths:
        while done < length:
            count = min(AT_ONCE, (length - done) // chunk)
            batch = document(memory, count, chunk)
            starts = batch.starts & (done == 0)
            state = model.read(batch.tokens.to(DEVICE), starts.to(DEVICE), state)
            done += count * chunk
        tokens = document(memory, 1, chunk).tokens.to(DEVICE)

        def run(known: Carried | None = state, tokens: Tensor = tokens) -> None:
            assert known is not None
            rewind(known)
            next_chunk(model, tokens, known)

        yield run


@torch.no_grad()
def next_chunk(model: Decoder, tokens: Tensor, state: Carried) -> Tensor:
    """Return the logits of the last token of a segment [B, 1, S] that starts no document."""
    starts = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=DEVICE)
    logits: Tensor = model(tokens, starts, state, only=-1)[0]
    return logits


@torch.no_grad()
def behind_keys(model: Decoder, length: int, chunk: int) -> Run:
    """Return what reads the next chunk behind the keys of so many tokens, in one open segment."""
    starts = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    segment_len = length + chunk
    opened = Incremental(model, segment_len, starts, empty(model, starts, segment_len))
    opened.tokens = torch.zeros(1, length, dtype=torch.int64, device=DEVICE)
    for i, layer in enumerate(opened.layers):
        size = (1, length, *layer.k.shape[2:])
        k, v = (torch.randn(size, device=DEVICE, dtype=layer.k.dtype) for _ in "kv")
        opened.layers[i] = layer._replace(k=k, v=v)
    tokens = torch.randint(0, model.config.vocab_size, (1, chunk), device=DEVICE)

    @torch.no_grad()
    def run() -> None:
        opened.read(tokens, every=False)
        # Back to so many; views, so that no round holds the keys twice.
        opened.tokens = opened.tokens[:, :length]
        for i, layer in enumerate(opened.layers):
            opened.layers[i] = layer._replace(k=layer.k[:, :length], v=layer.v[:, :length])

    return run


def graphs(options: Options) -> Table:
    """The next chunk with the logits of its last token, eager and as one CUDA graph.

    For memories that live in the layers: everything that depends on the chunk's length alone is
    made before, tokens and state lie still, and a replay leaves the next state in their place.
    """
    yield ["memory", "chunk", "eager, ms", "graph, ms", "times", "error"]
    for name, memory in MEMORIES.items():
        model = on_device(shape(TOY if options.tiny else MIDDLE, memory))
        if isinstance(model.memory, InTurn) or name == "landmark":
            continue  # rows go through the stack segment by segment; a store that grows
        for chunk in (64,) if options.tiny else (512, 2048):
            make = functools.partial(compare, model, memory, chunk, options.rounds)
            yield attempt([name, f"{chunk:,}"], make)


def compare(model: Decoder, memory: MemoryConfig, chunk: int, rounds: int) -> Row:
    """Return the times of both, and the graph's error after three chunks."""
    batches = [document(memory, 1, chunk).tokens.to(DEVICE) for _ in range(5)]
    starts = torch.zeros(1, 1, dtype=torch.bool, device=DEVICE)
    begun = model.read(torch.cat(batches[:2], 1), starts.expand(1, 2), None)
    tokens, state, logits, replay = captured(model, batches[0], begun)
    known = begun
    for batch in batches[2:]:
        tokens.copy_(batch)
        replay()
        with torch.no_grad():
            expected, known = model(batch, starts, known, only=-1)
    error = Error(difference(logits, expected), GRAPHS)
    eager = times(lambda: next_chunk(model, tokens, state), rounds)
    graph = times(replay, rounds)
    return [eager.ms, graph.ms, f"{eager.median / graph.median:.2f}", error]


@torch.no_grad()
def captured(model: Decoder, tokens: Tensor, state: Carried) -> tuple[Tensor, Carried, Tensor, Run]:
    """Return tokens, state and logits that lie still, and what reads the one and moves both."""
    tokens, still = tokens.clone(), map_tensors(Tensor.clone, state)
    starts = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=DEVICE)
    segments = model.segments(tokens, starts, fresh=False)  # RoPE's tables come from the host
    logits = torch.empty_like(next_chunk(model, tokens, state))

    @torch.no_grad()
    def run() -> None:
        x, _, layers = model.through(model.embed(tokens), None, segments, still.layers)
        logits.copy_(model.logits(x[-1:]))
        overwrite(still, Carried(layers, []))

    replay = as_graph(run)
    overwrite(still, state)
    return tokens, still, logits, replay


def overwrite(state: Carried, other: Carried) -> None:
    """Put the tensors of another state into those of the first."""
    held: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    map_tensors(note, state)
    count = len(held)
    map_tensors(note, other)
    for own, new in zip(held[:count], held[count:], strict=True):
        own.copy_(new)
