"""The scan over segments against the loop that it stands for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import merge
from model.config import AbcMemory, CmabMemory, FamMemory, InfiniMemory, PartConfig
from model.memory.base import Part, detach, named_tensors
from model.memory.scan import Item, scan
from model.memory.window import read_tokens
from tests.compare import assert_each
from tests.model.slow import EXACT
from tests.model.small import batch_of, build, config_of, gradients

Join = Callable[[Item, Item], Item]


def add(a: Item, b: Item) -> Item:
    return (a[0] + b[0],)


def then(a: Item, b: Item) -> Item:
    """The affine map a, then b."""
    return b[0] @ a[0], b[0] @ a[1] + b[1]


def join_softmax(a: Item, b: Item) -> Item:
    return merge((a[0], a[1]), (b[0], b[1]))


def loop(join: Join, items: Item, carried: Item, starts: Tensor) -> tuple[Item, Item]:
    """scan, one stream and one segment at a time."""
    befores, afters = [], []
    for b, row in enumerate(starts):
        now, before = tuple(x[b] for x in carried), []
        for n, start in enumerate(row):
            item = tuple(x[b, n] for x in items)
            before.append(now)
            now = item if start else join(now, item)
        befores.append([torch.stack(parts) for parts in zip(*before, strict=True)])
        afters.append(now)
    return tuple(
        tuple(torch.stack(parts) for parts in zip(*rows, strict=True)) for rows in (befores, afters)
    )  # type: ignore[return-value]


def draw_items(kind: str, shape: tuple[int, ...], seed: int, empty: bool) -> Item:
    generator = torch.Generator().manual_seed(seed)

    def random(*more: int) -> Tensor:
        return torch.randn(*shape, *more, generator=generator, dtype=torch.float64)

    if kind == "sums":
        return (random(3),)
    if kind == "affine maps":
        return 0.7 * random(3, 3), random(3, 2)
    lse = 3 * random(2)
    if empty:
        lse[..., 0] = float("-inf")
    return random(2, 4), lse


JOINS: dict[str, Join] = {"sums": add, "affine maps": then, "softmax": join_softmax}


@pytest.mark.parametrize("kind", JOINS)
@settings(max_examples=40, deadline=None)
@given(
    starts=st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=2)
    ),
    seed=st.integers(0, 999),
    empty=st.sampled_from(["nothing", "carried", "items"]),
)
def test_scan_is_the_loop(kind: str, starts: list[list[bool]], seed: int, empty: str) -> None:
    """Values and gradients, wherever documents start; empty softmax pieces too."""
    flags = torch.tensor(starts)
    results = []
    for run in (scan, loop):
        items = draw_items(kind, tuple(flags.shape), seed, empty == "items")
        carried = draw_items(kind, tuple(flags.shape[:1]), seed + 1, empty == "carried")
        leaves = [x.requires_grad_() for x in (*items, *carried)]
        before, after = run(JOINS[kind], items, carried, flags)
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64)
        for x in (*before, *after):
            weight = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            total = total + (torch.where(x.isinf(), 0.0, x) * weight).sum()
        total.backward()
        values = {f"value {i}": x.nan_to_num(neginf=-1e3) for i, x in enumerate((*before, *after))}
        grads = {f"gradient {i}": x.grad for i, x in enumerate(leaves)}
        results.append(values | grads)
    assert_each(results[0], results[1], EXACT)


PARTS: list[PartConfig] = [
    InfiniMemory("linear"),
    InfiniMemory("delta"),
    AbcMemory(slots=3),
    CmabMemory(latents=3),
    FamMemory(slots=3, state="norm"),
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("memory", PARTS, ids=lambda m: f"{m.name}-{getattr(m, 'rule', '')}")
def test_a_parts_chain_is_its_loop_over_segments(memory: PartConfig, weighted: bool) -> None:
    """Reads, the state after, and gradients of rows, weights and the state carried in."""
    own = type(build(config_of(memory)).blocks[0].mixer.parts[memory.name]).chain
    assert own is not Part.chain
    assert_each(run_chain(memory, own, weighted), run_chain(memory, Part.chain, weighted), EXACT)


def run_chain(memory: PartConfig, chain: Any, weighted: bool) -> dict[str, Tensor]:
    """Return what a chain of six segments gives after one that was carried."""
    model, batch = build(config_of(memory)), batch_of(2, 7, 4)
    batch.starts[0, 3] = batch.starts[1, 1] = batch.starts[1, 6] = True
    with torch.no_grad():
        _, state = model(batch.tokens[:, :1], batch.starts[:, :1])
    block = model.blocks[0]
    carried = detach(state.layers[0].parts[memory.name])
    leaves = [x for x in named_tensors(carried, "").values() if x.is_floating_point()]
    rows = model.embed(batch.tokens[:, 1:]).detach()
    for x in (*leaves, rows):
        x.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(2, 6, generator=generator, dtype=torch.float64) if weighted else None
    segments = model.segments(batch.tokens[:, 1:], batch.starts[:, 1:], fresh=False)
    segments = segments._replace(weights=weights)
    tokens, _ = read_tokens(block, rows, segments, state.layers[0].window)
    initial = model.memory.initial([block], model.linears)[0][memory.name]
    found = chain(block.mixer.parts[memory.name], block, segments, tokens, carried, initial)
    values = named_tensors(list(found), "")
    total = torch.zeros((), dtype=torch.float64)
    for x in values.values():
        if x.is_floating_point():
            mix = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            total = total + (torch.where(x.isinf(), 0.0, x) * mix).sum()
    total.backward()
    for x in model.parameters():
        x.grad = torch.zeros_like(x) if x.grad is None else x.grad
    result = {name: x.double().nan_to_num(neginf=-1e3) for name, x in values.items()}
    result |= {f"gradient of {name}": x for name, x in gradients(model).items()}
    return result | {f"gradient {i}": x.grad for i, x in enumerate((*leaves, rows))}
