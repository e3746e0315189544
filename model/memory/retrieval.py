"""Reading the best blocks of a long past, at positions that training has seen.

Of all blocks in the store a query reads the `top_k` whose landmarks score best, by the grouped
softmax of model.memory.grouped: the landmarks gate, each block's own softmax says what is read.
Positions are "stingy": top_k + 1 slots of a block each lie before the first local position, however
long the past is. The last top_k blocks are scored at their true places, slots 1 .. top_k, all older
ones at slot 0; then the chosen ones, in order of age, take slots from the oldest on, with one slot
left empty between old and recent ones. With at most top_k blocks in the store every block is read
where it truly is. Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 3.2 and its code, whose first
local position falls into the last slot while the store fills up; here it never does.

What a layer does with segment n of its streams, the window being M segments:

    store = forget(store, starts[:, n])
    past = retrieve(q, store, top_k=k, places=M * S + positions, rope=rope)
    local = grouped piece(s) of window and segment, rotated from position 0 or any other on
    out, lse = merge(local, (past.out, past.lse))
    k, v: of the segment that leaves the window, k not rotated
    store = append(store, in_blocks(k, block, rope), v, belongs=age >= M)

RoPE knows distances only, so local pieces need no shift: `places` says where queries stand from the
first local position on, retrieval adds its slots before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.memory.block_store import BlockStore
from model.precision import sum_dtype
from model.rope import rotate

Granularity = Literal["token_and_head", "heads", "tokens"]
"""What has a choice of its own: every token and head (as in training); every token, by its best
head's softmax over landmarks; every head, by the best token of the call."""

Rope = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(cos, sin), each [*positions, K / 2], of integer positions of any shape."""


class _Limits(NamedTuple):
    """Numbers held at once."""

    scores: int  # of landmarks
    read: int  # of what blocks say to queries
    gathered: int  # of keys that are read; of values as many


_CPU = _Limits(scores=2**22, read=2**26, gathered=2**20)
_ELSEWHERE = _Limits(scores=2**26, read=2**26, gathered=2**24)
"""A CPU's are what its caches hold; on a GPU each further portion of keys waits for the host."""

_STRETCH = 64
"""Scores of which the greatest is known before any is sorted."""

_WIDTH = 8
"""Queries that read a block together. The same for every call: a matrix product rounds a row by its
shape, and what a row gives must not hang on other streams or later tokens."""


_ROUNDING = {torch.float64: 2.0**-46, torch.float32: 2.0**-20, torch.float16: 2.0**-13,
             torch.bfloat16: 2.0**-10}  # fmt: skip
"""By the keys' type: scores that rounding alone may have parted, in those of |q| |k|."""


def newest_of_best(scores: Tensor, count: int, slack: Tensor | float = 0.0) -> Tensor:
    """Return the places of the `count` greatest of scores [..., n], rising: [..., count] int64.

    Of those within `slack` [..., 1] of the last the newest: they are ties. In the lowest layer all
    landmarks are one and the same key, but for what a matrix product makes of equal rows at other
    places; and topk breaks ties as it likes, differently with gradients and without. nan is the
    least of all.
    """
    if scores.shape[-1] <= count:
        return _newest_of_ties(scores, count, slack)
    values, places = _greatest(scores, count + 1)
    # nan, which topk has first, and -inf are not apart from anything.
    apart = values[..., -2:-1] - values[..., -1:] > slack
    places = places[..., :-1].sort(-1).values
    tied = ~(apart & values[..., :1].isfinite()).squeeze(-1)
    if tied.any():
        some = slack[tied] if isinstance(slack, Tensor) else slack
        places[tied] = _newest_of_ties(scores[tied], count, some)
    return places


def _greatest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` greatest of scores [..., n] and their places, as topk does.

    Of many by stretches: the greatest lie in the `count` stretches whose own greatest are. One
    pass reads them all then, where topk sorts.
    """
    n = scores.shape[-1]
    if n < 2 * count * _STRETCH:
        return scores.topk(count, -1)
    whole = n - n % _STRETCH
    stretches = scores[..., :whole].unflatten(-1, (-1, _STRETCH))
    best = stretches.amax(-1).topk(count, -1).indices
    among = stretches.take_along_dim(best.unsqueeze(-1), -2).flatten(-2)
    values, which = torch.cat((among, scores[..., whole:]), -1).topk(count, -1)
    within = torch.arange(_STRETCH, device=best.device)
    places = (best.unsqueeze(-1) * _STRETCH + within).flatten(-2)
    rest = torch.arange(whole, n, device=best.device).expand(*best.shape[:-1], -1)
    return values, torch.cat((places, rest), -1).take_along_dim(which, -1)


def _newest_of_ties(scores: Tensor, count: int, slack: Tensor | float) -> Tensor:
    """Return what newest_of_best does, in a dozen passes over all scores."""
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    least = scores.topk(count, -1).values[..., -1:]
    above = scores > least + slack
    tied = (scores >= least - slack) & ~above
    wanted = count - above.sum(-1, keepdim=True)
    from_the_end = tied.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    chosen = above | (tied & (from_the_end <= wanted))
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], count)


class Retrieved(NamedTuple):
    """A piece for attention.merge with the local ones, and where it comes from."""

    out: Tensor  # [B, H, S, K], float32 or float64
    lse: Tensor  # [B, H, S]; -inf where the row has no block to read
    blocks: Tensor  # [B, H or 1, S or 1, top_k] int64: numbers in the document, rising; -1: none


def in_blocks(k: Tensor, block: int, rope: Rope) -> Tensor:
    """Return keys [B, S, Hkv, K], not rotated, as a store keeps them: turned within their block.

    Each by its place there, landmarks by block - 1. So queries turn to where a block is read, and
    no key turns again.
    """
    count = k.shape[1] // block
    cos, sin = (x.repeat(count, 1).unsqueeze(-2) for x in rope(torch.arange(block)))
    return rotate(k, cos, sin)


def retrieve(
    q: Tensor,
    store: BlockStore,
    *,
    top_k: int,
    places: Tensor,
    rope: Rope,
    granularity: Granularity = "token_and_head",
) -> Retrieved:
    """Return what queries read of the best `top_k` blocks of the store.

    q [B, S, H, K], not rotated; places [S] int64, CPU: where each query stands, from the first
    local position (of the window, if there is one). Differentiable in q and the store's keys and
    values; the choice is not.
    """
    queries = _Queries(q, store, top_k, places, rope)
    if not queries.landmarks.shape[2]:
        return queries.nothing()
    chosen = queries.choose(granularity)
    out, lse = queries.read(chosen)
    numbers = chosen + store.origin.view(-1, 1, 1, 1)
    return Retrieved(out, lse, numbers.masked_fill(chosen < 0, -1))


class _Queries:
    """The queries of one call, heads first, and the store they read."""

    def __init__(
        self, q: Tensor, store: BlockStore, top_k: int, places: Tensor, rope: Rope
    ) -> None:
        assert top_k >= 1, f"top_k={top_k} reads nothing"
        wide = sum_dtype(q)
        self.q = q.transpose(1, 2).to(wide)
        self.store, self.top_k, self.rope = store, top_k, rope
        self.block, self.count = store.block, store.num_blocks
        self.places = places + (top_k + 1) * store.block
        first, last = torch.stack(store.first.aminmax()).tolist()
        self.lost = first  # the first blocks, which no stream reads any more
        self.num_hidden = last - first  # the next ones, from one stream at least
        self.landmarks = store.landmarks[:, :, first : self.count].to(wide)
        self.scale = q.shape[-1] ** -0.5
        self.group = q.shape[2] // store.keys.shape[2]
        self.limits = _CPU if q.device.type == "cpu" else _ELSEWHERE

    def nothing(self) -> Retrieved:
        """Return the read of an empty store."""
        lse = torch.full_like(self.q[..., 0], float("-inf"))
        blocks = torch.full((*lse.shape, self.top_k), -1, device=lse.device)
        return Retrieved(torch.zeros_like(self.q), lse, blocks)

    def _rows(self, numbers: int, each: int) -> Iterator[slice]:
        """Yield rows, so few at a time that there are no more numbers, `each` a head and row."""
        batch, heads, length, _ = self.q.shape
        at_once = max(numbers // (batch * heads * each), 1)
        for start in range(0, length, at_once):
            yield slice(start, min(start + at_once, length))

    def scores(self, rows: slice) -> Tensor:
        """Return each row's score of every landmark [B, H, R, n]; -inf where hidden."""
        landmarks = self.landmarks
        recent = min(self.top_k, landmarks.shape[2])
        q = rotate(self.q[:, :, rows], *self.rope(self.places[rows]))
        scores = self._against(q, landmarks)  # old blocks stand at slot 0
        slots = torch.arange(self.top_k - recent + 1, self.top_k + 1)
        turned = rotate(landmarks[:, :, -recent:], *self.rope(slots * self.block))
        scores[..., -recent:] = self._against(q, turned)
        return self._hide(scores)

    def _against(self, q: Tensor, keys: Tensor) -> Tensor:
        """Return scores of q [B, H, R, K] and keys [B, Hkv, n, K]: [B, H, R, n]."""
        folded = (q * self.scale).unflatten(1, (-1, self.group)).flatten(2, 3)
        result: Tensor = (folded @ keys.mT).unflatten(2, (self.group, -1)).flatten(1, 2)
        return result

    def _hide(self, scores: Tensor) -> Tensor:
        """Set scores [B, H, R, count] of blocks that a stream must not read to -inf."""
        some = scores[..., : self.num_hidden]
        number = torch.arange(self.num_hidden, device=scores.device) + self.lost
        some.masked_fill_(number < self.store.first.view(-1, 1, 1, 1), float("-inf"))
        return scores

    @torch.no_grad()
    def choose(self, granularity: Granularity) -> Tensor:
        """Return the blocks that are read: [B, H or 1, S or 1, top_k] by granularity, see _best."""
        slack = self._slack()
        found, best = [], None
        for rows in self._rows(self.limits.scores, self.landmarks.shape[2]):
            scores, here = self.scores(rows), slack[:, :, rows]
            if granularity == "token_and_head":
                found.append(self._best(scores, here))
                continue
            scores = scores.log_softmax(-1)  # a probability that underflows would tie with hidden
            if granularity == "heads":
                found.append(self._best(scores.amax(1, True), here.amax(1, True)))
                continue
            scores = scores.amax(2, True)
            best = scores if best is None else torch.maximum(best, scores)
        return torch.cat(found, 2) if best is None else self._best(best, slack.amax(2, True))

    def _slack(self) -> Tensor:
        """Return how far rounding may part a row's scores of one key: [B, H, S, 1]."""
        longest = self.landmarks.norm(dim=-1).amax(-1)  # [B, Hkv]
        longest = longest.repeat_interleave(self.group, 1)[:, :, None, None]
        length = self.q.norm(dim=-1, keepdim=True)
        slack: Tensor = _ROUNDING[self.store.keys.dtype] * self.scale * length * longest
        return slack.nan_to_num(0.0)

    def _best(self, scores: Tensor, slack: Tensor) -> Tensor:
        """Return the numbers in the store of the best blocks, rising; -1 first where too few."""
        some = min(self.top_k, scores.shape[-1])
        number = newest_of_best(self._hide(scores), some, slack) + self.lost
        number = number.masked_fill(number < self.store.first.view(-1, 1, 1, 1), -1)
        missing = self.top_k - number.shape[-1]
        number = torch.nn.functional.pad(number, (missing, 0), value=-1)
        return number.sort(-1).values

    def read(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of all rows over the chosen blocks [B, H or 1, S or 1, top_k]."""
        # As if each block chosen were another one: then a tile is one query and room for others.
        each = _WIDTH * self.top_k * max(self.block, self.q.shape[-1])
        alike = chosen.shape[2] == 1
        found = [
            self._read_rows(rows, chosen if alike else chosen[:, :, rows])
            for rows in self._rows(self.limits.read, each)
        ]
        out, lse = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        return out, lse

    def _read_rows(self, rows: slice, chosen: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, _, _ = self.q.shape
        q = self._at_slots(rows, chosen.expand(batch, heads, -1, -1)) * self.scale
        gates, said = self._read_each(q, chosen)
        gates = gates.masked_fill(chosen < 0, float("-inf"))
        # A row without any block: a softmax over -inf alone is nan, and so is its gradient.
        empty = (chosen < 0).all(-1, keepdim=True)
        gates = gates.masked_fill(empty, 0.0)
        lse = gates.logsumexp(-1, keepdim=True)
        out = (torch.exp(gates - lse).unsqueeze(-2) @ said).squeeze(-2)
        lse = lse.masked_fill(empty, float("-inf")).squeeze(-1)
        return out.masked_fill(empty, 0.0), lse

    def _read_each(self, q: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return each query's score of its block's landmark, and what the block says to it.

        q [B, H, R, top_k, K], scaled; chosen [B, H or 1, R or 1, top_k], any block where it is
        -1. [B, H, R, top_k]; [B, H, R, top_k, K]. Queries of one block read it together, by tiles.
        """
        tiles = _Tiles.of(self._rows_of_store(chosen).expand(q.shape[:-1]))
        together = tiles.gather(q.flatten(0, -2))
        at_once = max(self.limits.gathered // (self.block * q.shape[-1]), 1)
        gates, said = [], []
        for queries, blocks in zip(
            together.split(at_once), self._fetch(tiles.source, at_once), strict=True
        ):
            keys, values = blocks
            scores = queries @ keys.mT
            gates.append(scores[..., -1])
            said.append(scores[..., :-1].softmax(-1) @ values[:, :-1])
        gate, says = tiles.scatter(torch.cat(gates)), tiles.scatter(torch.cat(said))
        return gate.view(q.shape[:-1]), says.view_as(q)

    def _at_slots(self, rows: slice, chosen: Tensor) -> Tensor:
        """Return rows as they stand to their chosen blocks' slots: [B, H, R, top_k, K].

        A block at slot s and a query at p: the query turns by p - s * block. Only distances count,
        and the keys, turned by their place in the block, serve every slot.
        """
        recent = chosen >= self.count - self.top_k
        slots = torch.arange(self.top_k, device=chosen.device) + recent
        away = self.places[rows].unsqueeze(-1) - torch.arange(self.top_k + 1) * self.block
        everywhere = rotate(self.q[:, :, rows].unsqueeze(-2), *self.rope(away))
        return everywhere.take_along_dim(slots.unsqueeze(-1), -2)

    def _rows_of_store(self, chosen: Tensor) -> Tensor:
        """Return where the chosen blocks lie among [B, C, Hkv]: [B, H, R or 1, top_k]."""
        batch, heads = self.q.shape[:2]
        room, kv_heads = self.store.keys.shape[1:3]
        stream = torch.arange(batch, device=chosen.device).view(-1, 1, 1, 1)
        head = torch.arange(heads, device=chosen.device).view(-1, 1, 1) // self.group
        return (stream * room + chosen.clamp(min=0)) * kv_heads + head

    def _fetch(self, rows: Tensor, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys and values [<= at_once, block, K] of blocks; rows [t]: among [B, C, Hkv]."""
        store, device, wide = self.store, self.q.device, self.q.dtype
        old = store.keys.flatten(0, 2), store.values.flatten(0, 2)
        there = rows.to(store.keys.device).split(at_once)
        live = self._live_rows(rows, at_once)
        for number, some in enumerate(there):
            pair = tuple(x.index_select(0, some).to(device, wide) for x in old)
            if live is not None:
                where = live[0][number]
                for x, own in zip(pair, (live[1][number], live[2][number]), strict=True):
                    x.index_copy_(0, where, own)
            yield pair[0], pair[1]

    def _live_rows(
        self, rows: Tensor, at_once: int
    ) -> tuple[Items[Tensor], Items[Tensor], Items[Tensor]] | None:
        """Return which of each `at_once` rows are of live blocks, and their keys and values."""
        blocks = self.store.live_blocks()
        if blocks is None:
            return None
        live = blocks[0].shape[1]
        room, kv_heads = self.store.keys.shape[1:3]
        number = rows // kv_heads % room - (self.count - live)
        mine = number >= 0
        which = mine.nonzero().squeeze(-1)
        stream, head = rows // kv_heads // room, rows % kv_heads
        place = ((stream * live + number) * kv_heads + head)[which]
        sizes = torch.stack([part.sum() for part in mine.split(at_once)]).tolist()
        k, v = (x.flatten(0, 2).index_select(0, place).to(self.q.dtype) for x in blocks)
        return (which % at_once).split(sizes), k.split(sizes), v.split(sizes)


class _Tiles(NamedTuple):
    """Pairs of a query and a block, laid out so that each tile of queries reads one block."""

    source: Tensor  # [t]: the block of each tile, rising
    place: Tensor  # [pairs]: where each pair lies among [t * _WIDTH]

    @staticmethod
    def of(blocks: Tensor) -> _Tiles:
        """Lay out pairs by their blocks, of any shape; less than a tile a block stays empty."""
        unique, which, counts = blocks.unique(return_inverse=True, return_counts=True)
        which = which.flatten()
        per_block = (counts + _WIDTH - 1) // _WIDTH
        order = which.argsort()
        # Pairs in order stand behind each other; tiles begin anew with each block.
        ahead = (per_block * _WIDTH).cumsum(0) - per_block * _WIDTH - counts.cumsum(0) + counts
        place = torch.empty_like(which)
        place[order] = torch.arange(len(which), device=which.device) + ahead[which[order]]
        return _Tiles(unique.repeat_interleave(per_block), place)

    def gather(self, x: Tensor) -> Tensor:
        """[pairs, K] -> [t, _WIDTH, K], zeros where a tile has no pair."""
        room = x.new_zeros(len(self.source) * _WIDTH, x.shape[1])
        return room.index_copy(0, self.place, x).view(-1, _WIDTH, x.shape[1])

    def scatter(self, x: Tensor) -> Tensor:
        """[t, _WIDTH, ...] -> [pairs, ...]; undoes `gather`."""
        rows: Tensor = x.flatten(0, 1)
        return rows.index_select(0, self.place)
