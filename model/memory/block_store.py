"""The blocks that landmark attention can go back to: append-only, handed on like any state.

A store is a value: appending returns another one, and the old one stays what it was. Both share a
buffer with room behind its end. Who appends first writes there; who comes second to the same end
finds it taken and copies, unless the same blocks stand there: a checkpoint computes its forward
again. So a stream appends in amortised O(1), and a fork of it costs one copy.

Buffers hold values alone. Keys through which gradients flow stand beside them as well (`live`), so
that training costs what its window of segments is long and not what the document is. Full buffers
are moved between windows, where room is made for one more: inside, a checkpoint would do it twice.

Keys come as retrieval reads them: turned by their place in the block. Landmark keys, which every
query scores, lie with the queries; whole blocks, of which few are read, lie in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from model.memory.base import Axes


class Live(NamedTuple):
    """Positions that one append brought, in the graph that made them: [B, S, Hkv, K]."""

    k: Tensor
    v: Tensor


class BlockStore(NamedTuple):
    """The complete blocks of B streams, oldest first; room for C of them, C >= end.

    Rows of a batch grow together: each append adds as many blocks to every row. A row whose
    document is younger has its first blocks hidden.
    """

    # Keys of landmarks, on the queries' device: [B, Hkv, C, K]
    landmarks: Annotated[Tensor, Axes(heads=1)]
    # Of all positions, landmarks last in each block, in host memory: [B, C, Hkv, block, K]
    keys: Annotated[Tensor, Axes(heads=2)]
    values: Annotated[Tensor, Axes(heads=2)]
    end: Tensor  # [B] int64, CPU, all equal: blocks in the store
    taken: Tensor  # [B] int64, CPU: blocks anyone wrote to these buffers; shared, and written to
    first: Tensor  # [B] int64: the oldest block that the row may read
    origin: Tensor  # [B] int64: block i of the store is block i + origin of the row's document
    live: list[Live]  # the newest blocks: appended since `detach`, from the first with gradients on

    @property
    def block(self) -> int:
        """Positions of a block, its landmark counted."""
        return self.keys.shape[3]

    @property
    def num_blocks(self) -> int:
        """Blocks in the store, hidden ones too."""
        return int(self.end[0])

    def live_blocks(self) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of the live blocks, in their graph: [B, L, Hkv, block, K]."""
        if not self.live:
            return None
        k, v = (torch.cat(parts, 1) for parts in zip(*self.live, strict=True))
        return _by_block(k, self.block).contiguous(), _by_block(v, self.block).contiguous()

    def detach(self) -> BlockStore:
        """Return the store without the graph, which its buffers never were in; they are shared.

        With room for as many blocks again as were live.
        """
        num = sum(x.k.shape[1] for x in self.live) // self.block
        store = self._replace(live=[])
        return store if self.landmarks.shape[2] - self.num_blocks >= num else _moved(store, num)

    def compact(self) -> BlockStore:
        """Return the store of what a row can read, without room behind its end; views."""
        lost = int(self.first.min())
        kept = self.end - lost
        some = _narrowed(self, lost)
        return BlockStore(*some, kept, kept.clone(), self.first - lost, self.origin + lost, [])

    @staticmethod
    def join_rows(stores: Sequence[BlockStore]) -> BlockStore:
        """Return the streams of several stores as one: their newest blocks side by side."""
        assert not any(store.live for store in stores), "detach before joining"
        count = max(store.num_blocks for store in stores)
        padded = [_padded(store, count - store.num_blocks) for store in stores]
        joined = {
            name: torch.cat([getattr(store, name) for store in padded])
            for name in BlockStore._fields
            if name != "live"
        }
        return BlockStore(**joined, live=[])


def _padded(store: BlockStore, missing: int) -> BlockStore:
    """Return the store with so many hidden blocks before its own, and no room behind."""
    count = store.num_blocks

    def pad(x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = missing
        return torch.cat((x.new_zeros(shape), x.narrow(dim, 0, count)), dim)

    end = torch.full_like(store.end, count + missing)
    keys, values = pad(store.keys, 1), pad(store.values, 1)
    first, origin = store.first + missing, store.origin - missing
    return BlockStore(pad(store.landmarks, 2), keys, values, end, end.clone(), first, origin, [])


def empty_store(batch: int, kv_heads: int, block: int, like: Tensor) -> BlockStore:
    """Return a store without blocks; like [..., K]: type, the queries' device and head_dim."""
    head_dim, none = like.shape[-1], torch.zeros(batch, dtype=torch.int64)
    blocks = torch.empty(batch, 0, kv_heads, block, head_dim, dtype=like.dtype)
    there = torch.zeros(batch, dtype=torch.int64, device=like.device)
    landmarks = like.new_empty(batch, kv_heads, 0, head_dim)
    return BlockStore(landmarks, blocks, blocks, none, none.clone(), there, there, [])


def forget(store: BlockStore, starts: Tensor) -> BlockStore:
    """Return the store with every block hidden from rows that start a document: starts [B] bool."""
    count = store.num_blocks
    return store._replace(
        first=store.first.masked_fill(starts, count),
        origin=store.origin.masked_fill(starts, -count),
    )


def append(store: BlockStore, k: Tensor, v: Tensor, *, belongs: Tensor | None = None) -> BlockStore:
    """Return the store with whole blocks of positions added, landmarks last in each.

    k, v [B, S, Hkv, K]. belongs [B] bool: False where these blocks are of an earlier
    document than the row's (the end of a window that a new document has not filled yet); they are
    hidden with all before them.
    """
    assert k.shape[1] % store.block == 0, f"{k.shape[1]} positions are no blocks of {store.block}"
    dtype = store.keys.dtype
    new = _Blocks.of(k.detach().to(dtype), v.detach().to(dtype), store.block)
    num = new.keys.shape[1]
    grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    if not _holds(store, new):
        if not _has_room(store, num):
            store = _moved(store, num)
        _write(store, new)
    live = [*store.live, Live(k, v)] if grad or store.live else []
    store = store._replace(end=store.end + num, live=live)
    if belongs is not None:
        store = forget(store, ~belongs)
    return store


class _Blocks(NamedTuple):
    """Some blocks, as the buffers of a store hold them."""

    landmarks: Tensor  # [B, Hkv, n, K]
    keys: Tensor  # [B, n, Hkv, block, K]
    values: Tensor

    @staticmethod
    def of(k: Tensor, v: Tensor, block: int) -> _Blocks:
        """Cut positions [B, S, Hkv, K] into blocks."""
        keys, values = _by_block(k, block), _by_block(v, block)
        return _Blocks(keys[..., -1, :].transpose(1, 2), keys, values)


def _by_block(x: Tensor, block: int) -> Tensor:
    """[B, S, Hkv, K] -> [B, S / block, Hkv, block, K]: a view."""
    result: Tensor = x.unflatten(1, (-1, block)).transpose(2, 3)
    return result


def _narrowed(store: BlockStore, first: int, last: int | None = None) -> _Blocks:
    """Return the blocks from `first` to the end, or to `last`: views."""
    span = slice(first, store.num_blocks if last is None else last)
    return _Blocks(store.landmarks[:, :, span], store.keys[:, span], store.values[:, span])


def _holds(store: BlockStore, new: _Blocks) -> bool:
    """Whether somebody wrote these very blocks behind the end."""
    count, num = store.num_blocks, new.keys.shape[1]
    if not (store.taken >= count + num).all():
        return False
    there = _narrowed(store, count, count + num)
    return all(torch.equal(old, x.to(old.device)) for old, x in zip(there, new, strict=True))


def _has_room(store: BlockStore, num: int) -> bool:
    """Whether `num` blocks fit behind the end, and nobody else wrote there.

    A store of some rows of another one shares its buffers, and may be the one who wrote.
    """
    count = store.num_blocks
    return (
        store.landmarks.shape[2] - count >= num
        and bool((store.taken == count).all())
        and all(x.is_contiguous() for x in (store.landmarks, store.keys, store.values))
    )


@torch.no_grad()
def _write(store: BlockStore, new: _Blocks) -> None:
    """Put blocks behind the end, in place."""
    count, num = store.num_blocks, new.keys.shape[1]
    for room, x in zip(_narrowed(store, count, count + num), new, strict=True):
        room.copy_(x)
    store.taken.fill_(count + num)


@torch.no_grad()
def _moved(store: BlockStore, num: int) -> BlockStore:
    """Return the store without the blocks that no row can read, in buffers of its own.

    With twice the room that `num` blocks more need.
    """
    lost = int(store.first.min())  # waits for the device; once in as many appends as it copies
    old = _narrowed(store, lost)
    kept = old.keys.shape[1]
    room, (batch, heads, _, head_dim) = 2 * (kept + num), old.landmarks.shape
    shape = (batch, room, *old.keys.shape[2:])
    landmarks = old.landmarks.new_empty(batch, heads, room, head_dim)
    end = torch.full_like(store.end, kept)
    moved = BlockStore(
        landmarks,
        old.keys.new_empty(shape),
        old.values.new_empty(shape),
        end,
        end.clone(),
        store.first - lost,
        store.origin + lost,
        store.live,
    )
    for mine, x in zip(_narrowed(moved, 0), old, strict=True):
        mine.copy_(x)
    return moved
