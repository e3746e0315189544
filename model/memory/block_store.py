"""The blocks that landmark attention can go back to: append-only, handed on like any state.

A store is a value: appending returns another one, and the old one stays what it was. Both share a
buffer with room behind its end. Who appends first writes there; who comes second to the same end
finds it taken and copies. So a stream appends in amortised O(1), and a fork of it costs one copy.

Keys are kept without RoPE: a block is read at whatever position retrieval gives it. Landmark keys,
which every query scores, lie with the queries; the blocks' own keys and values, of which few are
read, lie in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from model.memory.base import Axes


class BlockStore(NamedTuple):
    """The complete blocks of B streams, oldest first; room for C of them, C >= end.

    Rows of a batch grow together: each append adds as many blocks to every row. A row whose
    document is younger has its first blocks hidden.
    """

    # Keys of landmarks, on the queries' device: [B, Hkv, C, K]
    landmarks: Annotated[Tensor, Axes(heads=1)]
    # Keys and values of regular tokens, in host memory: [B, C, Hkv, block - 1, K]
    k: Annotated[Tensor, Axes(heads=2)]
    v: Annotated[Tensor, Axes(heads=2)]
    end: Tensor  # [B] int64, CPU, all equal: blocks in the store
    taken: Tensor  # [B] int64, CPU: blocks anyone wrote to these buffers; shared, and written to
    first: Tensor  # [B] int64: the oldest block that the row may read
    origin: Tensor  # [B] int64: block i of the store is block i + origin of the row's document

    @property
    def block(self) -> int:
        """Positions of a block, its landmark counted."""
        return self.k.shape[3] + 1

    @property
    def num_blocks(self) -> int:
        """Blocks in the store, hidden ones too."""
        return int(self.end[0])

    @staticmethod
    def join_rows(stores: Sequence[BlockStore]) -> BlockStore:
        """Return the streams of several stores as one: their newest blocks side by side."""
        count = max(store.num_blocks for store in stores)
        padded = [_padded(store, count - store.num_blocks) for store in stores]
        return BlockStore(*(torch.cat(tensors) for tensors in zip(*padded, strict=True)))


def _padded(store: BlockStore, missing: int) -> BlockStore:
    """Return the store with so many hidden blocks before its own, and no room behind."""
    count = store.num_blocks

    def pad(x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = missing
        return torch.cat((x.new_zeros(shape), x.narrow(dim, 0, count)), dim)

    end = torch.full_like(store.end, count + missing)
    keys, values = pad(store.k, 1), pad(store.v, 1)
    first, origin = store.first + missing, store.origin - missing
    return BlockStore(pad(store.landmarks, 2), keys, values, end, end.clone(), first, origin)


def empty_store(batch: int, kv_heads: int, block: int, like: Tensor) -> BlockStore:
    """Return a store without blocks; like [..., K]: type, the queries' device and head_dim."""
    head_dim, none = like.shape[-1], torch.zeros(batch, dtype=torch.int64)
    blocks = torch.empty(batch, 0, kv_heads, block - 1, head_dim, dtype=like.dtype)
    there = torch.zeros(batch, dtype=torch.int64, device=like.device)
    landmarks = like.new_empty(batch, kv_heads, 0, head_dim)
    return BlockStore(landmarks, blocks, blocks, none, none.clone(), there, there)


def forget(store: BlockStore, starts: Tensor) -> BlockStore:
    """Return the store with every block hidden from rows that start a document: starts [B] bool."""
    count = store.num_blocks
    return store._replace(
        first=store.first.masked_fill(starts, count),
        origin=store.origin.masked_fill(starts, -count),
    )


def append(store: BlockStore, k: Tensor, v: Tensor, *, belongs: Tensor | None = None) -> BlockStore:
    """Return the store with whole blocks of positions added, landmarks last in each.

    k, v [B, S, Hkv, K], not rotated. belongs [B] bool: False where these blocks are of an earlier
    document than the row's (the end of a window that a new document has not filled yet); they are
    hidden with all before them. Where gradients flow through keys or the store, all of it is
    copied.
    """
    assert k.shape[1] % store.block == 0, f"{k.shape[1]} positions are no blocks of {store.block}"
    new = _Blocks.of(k, v, store.block)
    tensors = (store.landmarks, store.k, store.v)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, k, v))
    if grad or not _has_room(store, new.num):
        store = _moved(store, new.num, grad)
    count, after = store.num_blocks, store.num_blocks + new.num
    if grad:
        landmarks = torch.cat((store.landmarks, new.landmarks), 2)
        keys, values = (
            torch.cat((old, x.to(old.device)), 1) for old, x in ((store.k, new.k), (store.v, new.v))
        )
        store = store._replace(
            landmarks=landmarks, k=keys, v=values, taken=torch.full_like(store.end, after)
        )
    else:
        with torch.no_grad():
            store.landmarks[:, :, count:after] = new.landmarks
            store.k[:, count:after] = new.k
            store.v[:, count:after] = new.v
            store.taken.fill_(after)
    store = store._replace(end=torch.full_like(store.end, after))
    if belongs is not None:
        store = forget(store, ~belongs)
    return store


class _Blocks(NamedTuple):
    landmarks: Tensor
    k: Tensor
    v: Tensor
    num: int

    @staticmethod
    def of(k: Tensor, v: Tensor, block: int) -> _Blocks:
        """Cut positions [B, S, Hkv, K] into blocks, and those as a store holds them."""
        keys = k.unflatten(1, (-1, block)).transpose(2, 3)
        values = v.unflatten(1, (-1, block)).transpose(2, 3)
        landmarks = keys[..., -1, :].transpose(1, 2)
        return _Blocks(landmarks, keys[..., :-1, :], values[..., :-1, :], keys.shape[1])


def _has_room(store: BlockStore, num: int) -> bool:
    """Whether `num` blocks fit behind the end, and nobody else wrote there.

    A store of some rows of another one shares its buffers, and may be the one who wrote.
    """
    count = store.num_blocks
    return (
        store.landmarks.shape[2] - count >= num
        and bool((store.taken == count).all())
        and all(x.is_contiguous() for x in (store.landmarks, store.k, store.v))
    )


def _moved(store: BlockStore, num: int, grad: bool) -> BlockStore:
    """Return the store without the blocks that no row can read, in buffers of its own.

    With twice the room that `num` blocks more need; with `grad` the buffers are cut to what is in
    them, and stay in the graph.
    """
    count = store.num_blocks
    lost = int(store.first.min())  # waits for the device; once in as many appends as it copies
    kept = count - lost
    landmarks = store.landmarks[:, :, lost:count]
    keys, values = store.k[:, lost:count], store.v[:, lost:count]
    if not grad:
        room, (batch, heads, _, head_dim) = 2 * (kept + num), landmarks.shape
        old = (landmarks, keys, values)
        shape = (batch, room, heads, store.block - 1, head_dim)
        landmarks = landmarks.new_empty(batch, heads, room, head_dim)
        keys, values = store.k.new_empty(shape), store.v.new_empty(shape)
        with torch.no_grad():
            landmarks[:, :, :kept], keys[:, :kept], values[:, :kept] = old
    end = torch.full_like(store.end, kept)
    first, origin = store.first - lost, store.origin + lost
    return BlockStore(landmarks, keys, values, end, end.clone(), first, origin)
