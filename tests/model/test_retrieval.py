"""Blocks of a long past: how they are kept, which are chosen, and what is read of them."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import merge
from model.memory import retrieval as module
from model.memory.base import compact, detach, map_tensors
from model.memory.block_store import BlockStore, append, empty_store, forget
from model.memory.grouped import grouped
from model.memory.grouped_softmax import GroupedSoftmax
from model.memory.retrieval import (
    Granularity,
    Retrieved,
    Rope,
    _greatest,
    _Limits,
    _newest_of_ties,
    in_blocks,
    newest_of_best,
    retrieve,
)
from model.rope import rope_tables, rotate
from tests.compare import relative

EXACT = 1e-10
"""float64: rounding is 1e-14 here."""

BLOCK, HEADS, KV_HEADS, HEAD_DIM = 4, 4, 2, 8
LIKE = torch.zeros(HEAD_DIM, dtype=torch.float64)
ROPE = partial(rope_tables, head_dim=HEAD_DIM, base=100.0, like=LIKE)
GRANULARITIES: list[Granularity] = ["token_and_head", "heads", "tokens"]
EACH = pytest.mark.parametrize("granularity", GRANULARITIES)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q = random(batch, length, HEADS, HEAD_DIM, seed=seed)
    k, v = (random(batch, length, KV_HEADS, HEAD_DIM, seed=seed + i) for i in (1, 2))
    return q, k, v


def store_of(k: Tensor, v: Tensor, store: BlockStore | None = None) -> BlockStore:
    """Return a store of all blocks of k, v, appended two at a time, behind those of another."""
    store = store or empty_store(len(k), k.shape[2], BLOCK, k)
    for keys, values in zip(k.split(2 * BLOCK, 1), v.split(2 * BLOCK, 1), strict=True):
        store = append(store, keys, values)
    return store


def past_of(k: Tensor, v: Tensor, rope: Rope = ROPE) -> BlockStore:
    """Return the store that queries read of k, not rotated, and v."""
    return store_of(in_blocks(k, BLOCK, rope), v)


def read(q: Tensor, store: BlockStore, top_k: int, **options: Any) -> Retrieved:
    places = options.pop("places", torch.arange(q.shape[1]))
    return retrieve(q, store, top_k=top_k, places=places, rope=ROPE, **options)


def content(store: BlockStore) -> list[Tensor]:
    n = store.num_blocks
    return [store.landmarks[:, :, :n], store.keys[:, :n], store.values[:, :n]]


def assert_holds(store: BlockStore, k: Tensor, v: Tensor) -> None:
    keys, values = (x.unflatten(1, (-1, BLOCK)).transpose(2, 3) for x in (k, v))
    expected = [keys[..., -1, :].transpose(1, 2), keys, values]
    for own, other in zip(content(store), expected, strict=True):
        assert torch.equal(own, other)


# ---------------------------------------------------------------- the store


def test_a_store_holds_what_was_appended() -> None:
    _, k, v = inputs(7 * BLOCK)
    assert_holds(store_of(k, v), k, v)


def test_an_older_handle_stays_what_it_was() -> None:
    """Two appends to one handle: whoever is second copies, and no handle changes."""
    _, k, v = inputs(8 * BLOCK)
    old = store_of(k[:, : 4 * BLOCK], v[:, : 4 * BLOCK])
    ends = [slice(i * BLOCK, (i + 1) * BLOCK) for i in (4, 5, 6)]
    forks = [append(old, k[:, end], v[:, end]) for end in ends]
    longer = append(forks[0], k[:, ends[1]], v[:, ends[1]])
    again = append(forks[0], k[:, ends[2]], v[:, ends[2]])
    for fork, parts in (
        (old, ()),
        *((fork, (end,)) for fork, end in zip(forks, ends, strict=True)),
        (longer, (ends[0], ends[1])),
        (again, (ends[0], ends[2])),
    ):
        assert_holds(
            fork,
            *(torch.cat((x[:, : 4 * BLOCK], *(x[:, part] for part in parts)), 1) for x in (k, v)),
        )


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 2)])
@pytest.mark.parametrize("rows_first", [False, True])
def test_a_store_of_some_rows_does_not_write_into_the_others(rows: slice, rows_first: bool) -> None:
    """Such a state shares buffers with the whole one; see map_tensors."""
    _, k, v = inputs(6 * BLOCK)
    half, more = slice(0, 4 * BLOCK), slice(4 * BLOCK, 5 * BLOCK)
    other = slice(5 * BLOCK, 6 * BLOCK)
    whole = append(store_of(k[:, : 3 * BLOCK], v[:, : 3 * BLOCK]), *(x[:, 12:16] for x in (k, v)))
    some = map_tensors(lambda x: x[rows], whole)
    if rows_first:
        some = append(some, k[rows, more], v[rows, more])
    whole = append(whole, k[:, other], v[:, other])
    if not rows_first:
        some = append(some, k[rows, more], v[rows, more])
    assert_holds(whole, *(torch.cat((x[:, half], x[:, other]), 1) for x in (k, v)))
    assert_holds(some, *(torch.cat((x[rows, half], x[rows, more]), 1) for x in (k, v)))


def test_one_stream_repeated_becomes_many() -> None:
    _, k, v = inputs(5 * BLOCK, batch=1)
    one = store_of(k[:, : 3 * BLOCK], v[:, : 3 * BLOCK])
    many = map_tensors(lambda x: x.expand(3, *x.shape[1:]), one)
    keys, values = (x.repeat(3, 1, 1, 1) * torch.arange(3).view(-1, 1, 1, 1) for x in (k, v))
    many = append(many, keys[:, 12:16], values[:, 12:16])
    expected = (torch.cat((x[:, :12].expand(3, -1, -1, -1), y[:, 12:16]), 1)
                for x, y in ((k, keys), (v, values)))  # fmt: skip
    assert_holds(many, *expected)


def test_appending_copies_seldom() -> None:
    """A new buffer each time the number of blocks doubled, and no other."""
    _, k, v = inputs(BLOCK)
    store, buffers = empty_store(2, KV_HEADS, BLOCK, LIKE), set()
    for _ in range(100):
        store = append(store, k, v)
        buffers.add(store.keys.data_ptr())
        kept = store  # keeps its buffer alive, so that no other gets its address
    assert kept.num_blocks == 100
    assert len(buffers) <= 7


def test_blocks_that_no_row_can_read_are_dropped() -> None:
    """A document of 3 blocks after the other: room is for twice the longest, not for them all."""
    q, _, _ = inputs(BLOCK)
    _, keys, values = inputs(51 * BLOCK, seed=7)
    store = empty_store(2, KV_HEADS, BLOCK, LIKE)
    for i in range(51):
        part = slice(i * BLOCK, (i + 1) * BLOCK)
        store = forget(store, torch.tensor([i % 3 == 0] * 2))
        store = append(store, keys[:, part], values[:, part])
    assert store.keys.shape[1] <= 2 * (3 + 1)
    found = read(q, store, 5)
    assert set(found.blocks.unique().tolist()) == {-1, 0, 1, 2}  # numbers of the document's own
    last = store_of(keys[:, -3 * BLOCK :], values[:, -3 * BLOCK :])
    assert relative(found.out, read(q, last, 5).out) < EXACT


def test_a_document_sees_none_of_the_one_before() -> None:
    """Row 1 begins a document after 3 blocks; the store's block 3 is still of the window's end."""
    q, k, v = inputs(6 * BLOCK)
    store = store_of(k[:, : 3 * BLOCK], v[:, : 3 * BLOCK])
    store = forget(store, torch.tensor([False, True]))
    fresh = read(q[:, :4], store, 8)
    assert torch.equal(fresh.lse[1], torch.full_like(fresh.lse[1], float("-inf")))
    assert torch.equal(fresh.out[1], torch.zeros_like(fresh.out[1]))
    part = slice(3 * BLOCK, 4 * BLOCK)
    store = append(store, k[:, part], v[:, part], belongs=torch.tensor([True, False]))
    part = slice(4 * BLOCK, 6 * BLOCK)
    store = append(store, k[:, part], v[:, part])
    found = read(q[:, :4], store, 8)
    assert found.blocks[0, 0, 0].tolist() == [-1, -1, 0, 1, 2, 3, 4, 5]
    assert found.blocks[1, 0, 0].tolist() == [-1, -1, -1, -1, -1, -1, 0, 1]
    alone = read(q[1:, :4], store_of(k[1:, part], v[1:, part]), 8)
    assert relative(found.out[1:], alone.out) < EXACT
    assert relative(found.lse[1:], alone.lse) < EXACT


def test_a_detached_store_goes_on() -> None:
    _, k, v = inputs(6 * BLOCK)
    store = detach(store_of(k[:, : 5 * BLOCK], v[:, : 5 * BLOCK]))
    assert_holds(append(store, k[:, 5 * BLOCK :], v[:, 5 * BLOCK :]), k, v)


def test_training_copies_seldom_and_keeps_the_graph_of_its_window_alone() -> None:
    """A pass computed again, as a checkpoint does, writes nothing; other keys are a fork's."""
    _, k, v = (x.requires_grad_() for x in inputs(8 * BLOCK))
    parts = [slice(i * BLOCK, (i + 1) * BLOCK) for i in range(8)]
    store = store_of(*(x[:, : 5 * BLOCK].detach() for x in (k, v)))
    buffer = store.keys.data_ptr()
    for part in parts[5:7]:
        longer = append(store, k[:, part], v[:, part])
        again = append(store, k[:, part], v[:, part])
        assert longer.keys.data_ptr() == again.keys.data_ptr() == buffer
        fork = append(store, v[:, part], k[:, part])
        assert fork.keys.data_ptr() != buffer
        store = detach(again)
        assert len(again.live) == len(longer.live) == 1
        assert not store.live
        assert not any(x.requires_grad for x in store[:-1])
        assert_holds(again, k[:, : part.stop], v[:, : part.stop])
    longer = append(append(store, k[:, parts[7]], v[:, parts[7]]), k[:, parts[0]], v[:, parts[0]])
    q = random(2, 3, HEADS, HEAD_DIM)
    dk, dv = torch.autograd.grad(read(q, longer, 9).out.sum(), (k, v))
    for grad in (dk, dv):
        reached = grad.unflatten(1, (-1, BLOCK)).abs().sum((0, 2, 3, 4)) > 0
        assert reached.tolist() == [True, *[False] * 6, True]


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_fork_that_differs_in_one_number_is_a_fork(part: str) -> None:
    """In the lowest layer all landmarks are alike: they do not tell two blocks apart."""
    _, k, v = inputs(7 * BLOCK)
    end = slice(6 * BLOCK, 7 * BLOCK)
    store = store_of(k[:, : end.start], v[:, : end.start])
    assert append(store, k[:, end], v[:, end]).keys.data_ptr() == store.keys.data_ptr()
    other_k, other_v = k.clone(), v.clone()
    (other_k if part == "keys" else other_v)[1, end.start, 1, 3] += 1e-9
    assert_holds(append(store, other_k[:, end], other_v[:, end]), other_k, other_v)


def test_blocks_without_gradients_behind_live_ones_are_read_as_they_are() -> None:
    _, k, v = (x.requires_grad_() for x in inputs(4 * BLOCK))
    first, last = slice(0, 2 * BLOCK), slice(2 * BLOCK, 4 * BLOCK)
    store = append(empty_store(2, KV_HEADS, BLOCK, LIKE), k[:, first], v[:, first])
    store = append(store, k[:, last].detach(), v[:, last].detach())
    q = random(2, 3, HEADS, HEAD_DIM)
    found = read(q, store, 4)
    alone = store_of(k.detach(), v.detach())
    assert torch.equal(found.out, read(q, alone, 4).out)
    dk, _ = torch.autograd.grad(found.out.sum(), (k, v))
    assert dk[:, first].any() and not dk[:, last].any()


def test_live_blocks_that_no_row_can_read_are_dropped_with_the_others() -> None:
    """A document begins in the window of gradients, and the buffers are full behind it."""
    _, k, v = (x.requires_grad_() for x in inputs(9 * BLOCK))
    store = empty_store(2, KV_HEADS, BLOCK, LIKE)
    for i in range(9):
        part = slice(i * BLOCK, (i + 1) * BLOCK)
        store = forget(store, torch.tensor([i == 5] * 2))
        store = append(store, k[:, part], v[:, part])
    assert store.num_blocks < sum(x.k.shape[1] for x in store.live) // BLOCK
    q = random(2, 3, HEADS, HEAD_DIM)
    found, last = read(q, store, 4), slice(5 * BLOCK, 9 * BLOCK)
    alone = read(q, store_of(k[:, last], v[:, last]), 4)
    assert torch.equal(found.out, alone.out)
    grads = (torch.autograd.grad(x.out.sum(), (k, v)) for x in (found, alone))
    for own, other in zip(*grads, strict=True):
        assert relative(own, other) < EXACT


def test_stores_in_a_graph_are_not_joined() -> None:
    _, k, v = (x.requires_grad_() for x in inputs(BLOCK))
    store = store_of(k, v)
    with pytest.raises(AssertionError, match="detach before"):
        BlockStore.join_rows([store, store])


def test_room_is_made_between_windows_and_not_inside() -> None:
    """Where a checkpoint would make it a second time."""
    _, k, v = (x.requires_grad_() for x in inputs(2 * BLOCK))
    store = detach(store_of(k, v))
    for _ in range(20):
        buffer = store.keys.data_ptr()
        longer = store_of(k, v, store)
        assert longer.keys.data_ptr() == buffer
        store = detach(longer)


def test_a_compact_store_is_what_rows_can_read() -> None:
    """However long the documents were before: a run that was interrupted saves the same."""
    _, k, v = inputs(9 * BLOCK)
    store = store_of(k[:, : 7 * BLOCK], v[:, : 7 * BLOCK])
    store = append(forget(store, torch.ones(2, dtype=torch.bool)), k[:, 28:], v[:, 28:])
    small, alone = compact(store), compact(store_of(k[:, 28:], v[:, 28:]))
    assert small.keys.shape[1] == 2 and not small.live
    assert all(torch.equal(a, b) for a, b in zip(small[:-1], alone[:-1], strict=True))


def test_a_compact_store_is_the_store_without_its_room() -> None:
    _, k, v = inputs(6 * BLOCK)
    store = store_of(k[:, : 5 * BLOCK], v[:, : 5 * BLOCK])
    assert store.keys.shape[1] > 5
    small = compact([store])[0]
    assert small.keys.shape[1] == small.values.shape[1] == small.landmarks.shape[2] == 5
    assert_holds(append(small, k[:, 5 * BLOCK :], v[:, 5 * BLOCK :]), k, v)
    assert_holds(append(store, k[:, 5 * BLOCK :], v[:, 5 * BLOCK :]), k, v)


# ---------------------------------------------------------------- reading


@EACH
@pytest.mark.parametrize("past", [0, 1, 3, 5])
def test_all_blocks_are_the_full_grouped_softmax(past: int, granularity: Granularity) -> None:
    """At most top_k blocks in the store: the computation of training, every block at its place."""
    length, before = 3 * BLOCK, past * BLOCK
    q, k, v = inputs(before + length)
    here = slice(before, before + length)
    cos, sin = (x.unsqueeze(-2) for x in ROPE(torch.arange(before + length)))
    turned = [x.transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v)]
    kernel = GroupedSoftmax(BLOCK)
    out, lse = kernel.forward(*turned, True)
    local = kernel.forward(*(x[:, :, here] for x in turned), True)
    store = past_of(k[:, :before], v[:, :before])
    found = read(q[:, here], store, 5, granularity=granularity)
    joined = merge(local, (found.out, found.lse))
    assert relative(joined[0], out[:, :, here]) < EXACT
    assert relative(joined[1], lse[:, :, here]) < EXACT


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, top_k: int, granularity: Granularity
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, lse, blocks) of one stream, step by step as section 1.5 of the paper's code.

    q [S, H, K]; k, v [past, Hkv, K]. One query and head at a time, every key at its own position.
    """
    length, heads, width = q.shape
    count, scale = len(k) // BLOCK, width**-0.5
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))

    def turn(x: Tensor, position: Tensor) -> Tensor:
        return rotate(x, *ROPE(position))

    scores = torch.empty(length, heads, count, dtype=q.dtype)
    queries = turn(q, ((top_k + 1) * BLOCK + torch.arange(length)).unsqueeze(-1))
    for c in range(count):
        slot = max(c - (count - top_k) + 1, 0)
        landmark = turn(k[c * BLOCK + BLOCK - 1], torch.tensor(slot * BLOCK + BLOCK - 1))
        scores[..., c] = (queries * landmark).sum(-1) * scale
    best = scores.softmax(-1)
    if granularity == "heads":
        best = best.amax(1, keepdim=True).expand_as(scores)
    if granularity == "tokens":
        best = best.amax(0, keepdim=True).expand_as(scores)
    blocks = best.topk(top_k, -1).indices.sort(-1).values
    out, lse = torch.empty_like(q), torch.empty_like(scores[..., 0])
    for i in range(length):
        for h in range(heads):
            gates, values = [], []
            for j, c in enumerate(blocks[i, h].tolist()):
                slot = j + (c >= count - top_k)
                span = slice(c * BLOCK, (c + 1) * BLOCK)
                keys = turn(k[span, h], slot * BLOCK + torch.arange(BLOCK))
                s = keys @ queries[i, h] * scale
                gates.append(s[-1])
                values.append(s[:-1].softmax(0) @ v[span, h][:-1])
            gate = torch.stack(gates)
            out[i, h], lse[i, h] = gate.softmax(0) @ torch.stack(values), gate.logsumexp(0)
    return out, lse, blocks


@EACH
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("few", [False, True])
def test_is_the_papers_retrieval(
    top_k: int, granularity: Granularity, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """few: rows one at a time, as for a long past."""
    if few:
        monkeypatch.setattr(module, "_CPU", _Limits(1, 1, 1))
    q, _, _ = inputs(6)
    _, k, v = inputs(9 * BLOCK, seed=3)
    found = read(q, past_of(k, v), top_k, granularity=granularity)
    for b in range(2):
        out, lse, blocks = by_definition(q[b], k[b], v[b], top_k, granularity)
        chosen = found.blocks[b].transpose(0, 1).expand_as(blocks)
        assert torch.equal(chosen, blocks)
        assert relative(found.out[b].transpose(0, 1), out) < EXACT
        assert relative(found.lse[b].transpose(0, 1), lse) < EXACT


@EACH
def test_the_gold_block_is_found(granularity: Granularity) -> None:
    """One landmark of 200 points to where every query looks; it lies far beyond any position."""
    q, k, v = inputs(200 * BLOCK)
    q, gold = q[:, :3], 17
    look = torch.ones(HEAD_DIM, dtype=q.dtype)
    turned = rotate(look, *ROPE(torch.tensor(BLOCK - 1 - 3 * BLOCK)))  # as seen from place 0
    k[:, gold * BLOCK + BLOCK - 1] = 20 * turned
    q[:, 0] = look
    found = read(q[:, :1], past_of(k, v), 2, granularity=granularity)
    assert (found.blocks == gold).any(-1).all()


@EACH
def test_queries_stand_as_far_from_blocks_as_their_places_say(granularity: Granularity) -> None:
    """Behind a window of two blocks, with all of the past read: the whole computation."""
    window, past = 2 * BLOCK, 3 * BLOCK
    before = past + window
    q, k, v = inputs(before + 3)
    places = window + torch.arange(3)
    store = past_of(k[:, :past], v[:, :past])
    found = read(q[:, before:], store, 3, places=places, granularity=granularity)
    cos, sin = (x.unsqueeze(-2) for x in ROPE(torch.arange(before + 3)))
    queries, keys, values = (
        x.transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v)
    )
    kernel, rows = GroupedSoftmax(BLOCK), queries[:, :, before:]
    whole = kernel.forward(rows, keys[:, :, :before], values[:, :, :before], False)
    near = kernel.forward(rows, keys[:, :, past:before], values[:, :, past:before], False)
    joined = merge(near, (found.out, found.lse))
    assert relative(joined[0], whole[0]) < EXACT
    assert relative(joined[1], whole[1]) < EXACT


@EACH
@pytest.mark.parametrize(("width", "gathered"), [(8, 2**24), (8, 1), (3, 100), (1, 2**24)])
def test_gradients_reach_every_key_that_was_read(
    granularity: Granularity, width: int, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole: the store is filled and read in one graph, as the definition is.

    However many queries of a block are a tile, and however many tiles are read at once.
    """
    monkeypatch.setattr(module, "_WIDTH", width)
    monkeypatch.setattr(module, "_CPU", module._CPU._replace(gathered=gathered))
    q, _, _ = inputs(6)
    _, k, v = inputs(7 * BLOCK, seed=3)
    dout, dlse = random(6, HEADS, HEAD_DIM, seed=8), random(6, HEADS, seed=9)
    q, k, v = (x[:1].clone().requires_grad_() for x in (q, k, v))
    out, lse, _ = by_definition(q[0], k[0], v[0], 2, granularity)
    expected = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    found = read(q, past_of(k, v), 2, granularity=granularity)
    results = (found.out[0].transpose(0, 1), found.lse[0].transpose(0, 1))
    grads = torch.autograd.grad(results, (q, k, v), (dout, dlse))
    for own, other in zip(grads, expected, strict=True):
        assert relative(own, other) < EXACT


def test_gradients_of_local_and_past_pieces_are_the_whole_s() -> None:
    """Through merge: training with retrieval, all blocks chosen, is training on all of it."""
    past, length = 2 * BLOCK, 2 * BLOCK
    q, k, v = (x.requires_grad_() for x in inputs(past + length))
    dout = random(2, HEADS, length, HEAD_DIM, seed=8)
    cos, sin = (x.unsqueeze(-2) for x in ROPE(torch.arange(past + length)))
    turned = [x.transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v)]
    whole = grouped(*turned, BLOCK, True)[0][:, :, past:]
    expected = torch.autograd.grad(whole, (q, k, v), dout, retain_graph=True)
    local = grouped(*(x[:, :, past:] for x in turned), BLOCK, True)
    found = read(q[:, past:], past_of(k[:, :past], v[:, :past]), 4)
    joined = merge(local, (found.out, found.lse))[0]
    for own, other in zip(torch.autograd.grad(joined, (q, k, v), dout), expected, strict=True):
        assert relative(own, other) < EXACT


def test_gradients_of_rows_without_a_past_are_numbers() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2 * BLOCK))
    store = forget(past_of(k, v), torch.tensor([True, False]))
    found = read(q, store, 2)
    local = grouped(*(x.transpose(1, 2) for x in (q, k, v)), BLOCK, True)
    past = (found.out, found.lse)
    dq, dk, _ = torch.autograd.grad(merge(local, past)[0].sum(), (q, k, v), retain_graph=True)
    assert dq.isfinite().all() and dk.isfinite().all()
    reads = torch.autograd.grad(read(q, store, 2).out.sum(), (q, k, v))
    for grad in reads:
        assert torch.equal(grad[0], torch.zeros_like(grad[0]))


@pytest.mark.parametrize("size", [1.0, 20.0, 1e4])
def test_of_equal_scores_the_newest_are_chosen_however_many_blocks(size: float) -> None:
    """No score gains by its place: a better one is found a million blocks back."""
    scores = torch.full((2, 1 << 20), size)
    scores[0, 7] += 1e-2 * size
    scores[1, -1] -= 1e-2 * size
    last = (1 << 20) - 1
    found = newest_of_best(scores, 3)
    assert found.tolist() == [[7, last - 1, last], [last - 3, last - 2, last - 1]]


def test_scores_that_rounding_has_parted_are_ties() -> None:
    """Equal keys at other rows of a matrix product come out an ulp apart on some CPUs."""
    scores = 1 + 1e-15 * torch.randn(3, 64, dtype=torch.float64)
    scores[:, 5], scores[:, 9] = 1.5, float("-inf")
    slack = torch.full((3, 1), 1e-13, dtype=torch.float64)
    assert newest_of_best(scores, 3, slack).tolist() == [[5, 62, 63]] * 3
    few = scores[:, [9, 5, 9]]
    assert newest_of_best(few, 2, slack).tolist() == [[1, 2]] * 3


@EACH
def test_of_blocks_with_one_landmark_but_for_rounding_the_newest_are_read(
    granularity: Granularity,
) -> None:
    q, k, v = inputs(32 * BLOCK)
    landmarks = k[:, :BLOCK].repeat(1, 32, 1, 1)[:, BLOCK - 1 :: BLOCK]
    k[:, BLOCK - 1 :: BLOCK] = landmarks * (1 + 1e-15 * random(*landmarks.shape))
    # Blocks 0 to 28 stand at one slot and tie; the last three, at slots of their own, score 0.
    k[:, 30 * BLOCK - 1 :: BLOCK] = 0.0
    store = past_of(k, v)
    rows = 1 if granularity == "tokens" else 8  # of several some row has more of the few last
    blocks = read(q[:, :rows], store, 3, granularity=granularity).blocks
    old = (blocks < 29).sum(-1)
    assert old.any()
    assert torch.equal(blocks.amin(-1).clamp(max=29), 29 - old)


def test_the_best_are_what_a_sort_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 3, (50, 2, 12), generator=generator).float()
    scores[scores == -3] = float("-inf")
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(newest_of_best(scores, 4), (11 - order[..., :4]).sort(-1).values)
    scores[0, 0] = float("nan")  # of a step that diverges, which the loss will say
    assert newest_of_best(scores, 4)[0, 0].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("blocks", [128, 1024])
def test_what_a_row_reads_hangs_on_no_other_row_to_the_bit(blocks: int) -> None:
    """Of other streams and of later tokens, however many of them read what it reads."""
    rope = partial(rope_tables, head_dim=64, base=100.0, like=torch.zeros(64))
    k, v = (random(3, blocks * BLOCK, KV_HEADS, 64, seed=i).float() for i in (1, 2))
    store = store_of(in_blocks(k, BLOCK, rope), v)
    q = random(3, 64, HEADS, 64).float()
    alike, later = q.clone(), q.clone()
    alike[1:] = q[1:, :1]
    later[:, 8:] = q[:, 8:9]

    def found(q: Tensor) -> Retrieved:
        return retrieve(q, store, top_k=4, places=torch.arange(q.shape[1]), rope=rope)

    whole = found(q)
    assert torch.equal(whole.out[0], found(alike).out[0])
    assert torch.equal(whole.lse[0], found(alike).lse[0])
    assert torch.equal(whole.out[:, :, :8], found(later).out[:, :, :8])


def test_float32_is_close() -> None:
    """Every block is read, so that rounding changes no choice."""
    q, _, _ = inputs(6)
    _, k, v = inputs(5 * BLOCK, seed=3)
    exact = read(q, past_of(k, v), 5)
    narrow = partial(rope_tables, head_dim=HEAD_DIM, base=100.0, like=LIKE.float())
    store = past_of(k.float(), v.float(), rope=narrow)
    found = retrieve(q.float(), store, top_k=5, places=torch.arange(6), rope=narrow)
    assert found.out.dtype == found.lse.dtype == torch.float32
    assert relative(found.out, exact.out) < 5e-6
    assert relative(found.lse, exact.lse) < 5e-6


@pytest.mark.parametrize("n", [1, 127, 255, 256, 257, 640, 1000])
def test_the_greatest_by_stretches_are_the_greatest(n: int) -> None:
    scores = random(2, 3, n)
    for i, value in enumerate((math.nan, math.inf, -math.inf)):
        scores[1, i, torch.arange(n) % 5 == 0] = value
    for count in (1, 2, 5):
        values, places = _greatest(scores, min(count, n))
        assert torch.equal(values.nan_to_num(), scores.topk(min(count, n), -1).values.nan_to_num())
        assert torch.equal(scores.take_along_dim(places, -1).nan_to_num(), values.nan_to_num())
        assert all(len(set(row)) == len(row) for row in places.flatten(0, 1).tolist())


@pytest.mark.parametrize("seed", range(40))
def test_the_quick_choice_is_that_of_all_passes(seed: int) -> None:
    """Whole numbers tie, reals do not; with what is no number, and with too few to choose among."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 40, (), generator=generator))
    count = int(torch.randint(1, min(n, 8) + 1, (), generator=generator))
    scores = torch.randn(2, 3, 5, n, generator=generator)
    if seed % 2:
        scores = scores.round() + 1e-7 * torch.rand(scores.shape, generator=generator)
    for every, value in ((3, math.nan), (5, -math.inf), (7, math.inf)):
        if seed % every == 0:
            scores[torch.rand(scores.shape, generator=generator) < 0.1] = value
    slack = torch.full((2, 3, 5, 1), 1e-5) if seed % 2 else 0.0
    expected = _newest_of_ties(scores, count, slack)
    assert torch.equal(newest_of_best(scores, count, slack), expected)
