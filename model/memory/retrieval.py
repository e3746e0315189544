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
    store = append(store, k, v of the segment that leaves the window, belongs=age >= M)

RoPE knows distances only, so local pieces need no shift: `places` says where queries stand from the
first local position on, retrieval adds its slots before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

ALL = slice(None)
_SCORES = 2**26
"""Landmark scores held at once: 256 MiB in float32."""

_GATHERED = 2**24
"""Numbers of keys held at once for rows that choose for themselves: 64 MiB, and of values too."""


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
    values, places = scores.topk(count + 1, -1)
    # nan, which topk has first, and -inf are not apart from anything.
    apart = values[..., -2:-1] - values[..., -1:] > slack
    places = places[..., :-1].sort(-1).values
    tied = ~(apart & values[..., :1].isfinite()).squeeze(-1)
    if tied.any():
        some = slack[tied] if isinstance(slack, Tensor) else slack
        places[tied] = _newest_of_ties(scores[tied], count, some)
    return places


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
    if not store.num_blocks:
        return queries.nothing()
    shared = queries.choose_for_all() if granularity == "tokens" else None
    found = []
    for rows in queries.rows(gather=shared is None):
        chosen = shared
        if chosen is None:
            chosen = queries.choose(rows, granularity == "heads")
        found.append((*queries.read(rows, chosen), chosen))
    out, lse, chosen = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    chosen = chosen if shared is None else shared
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
        self.scale = q.shape[-1] ** -0.5
        self.group = q.shape[2] // store.k.shape[2]
        self.num_hidden = int(store.first.max())  # the first blocks, from one stream at least

    def nothing(self) -> Retrieved:
        """Return the read of an empty store."""
        lse = torch.full_like(self.q[..., 0], float("-inf"))
        blocks = torch.full((*lse.shape, self.top_k), -1, device=lse.device)
        return Retrieved(torch.zeros_like(self.q), lse, blocks)

    def rows(self, gather: bool) -> Iterator[slice]:
        """Yield rows, so few at a time that memory stays bounded."""
        batch, heads, length, head_dim = self.q.shape
        at_once = _SCORES // (batch * heads * max(self.count, self.top_k * self.block))
        if gather:
            read = batch * heads * self.top_k * (self.block - 1) * head_dim
            at_once = min(at_once, _GATHERED // read)
        at_once = max(at_once, 1)
        for start in range(0, length, at_once):
            yield slice(start, min(start + at_once, length))

    def rotated(self, rows: slice, back: int) -> Tensor:
        """Return the queries [B, H, R, K] as they stand to keys rotated `back` too little."""
        return rotate(self.q[:, :, rows], *self.rope(self.places[rows] - back))

    @torch.no_grad()
    def scores(self, rows: slice) -> Tensor:
        """Return each row's score of every landmark [B, H, R, count]; -inf where hidden."""
        landmarks = self.store.landmarks[:, :, : self.count].to(self.q.dtype)
        recent = min(self.top_k, self.count)
        # Old blocks stand at slot 0: the queries turn back instead of so many keys forward.
        scores = self._against(self.rotated(rows, self.block - 1), landmarks)
        slots = torch.arange(self.top_k - recent + 1, self.top_k + 1)
        turned = rotate(landmarks[:, :, -recent:], *self.rope((slots + 1) * self.block - 1))
        scores[..., -recent:] = self._against(self.rotated(rows, 0), turned)
        return self._hide(scores)

    def _against(self, q: Tensor, keys: Tensor) -> Tensor:
        """Return scores of q [B, H, R, K] and keys [B, Hkv, n, K]: [B, H, R, n]."""
        folded = (q * self.scale).unflatten(1, (-1, self.group)).flatten(2, 3)
        result: Tensor = (folded @ keys.mT).unflatten(2, (self.group, -1)).flatten(1, 2)
        return result

    def _hide(self, scores: Tensor) -> Tensor:
        """Set scores [B, H, R, count] of blocks that a stream must not read to -inf."""
        some = scores[..., : self.num_hidden]
        number = torch.arange(self.num_hidden, device=scores.device)
        some.masked_fill_(number < self.store.first.view(-1, 1, 1, 1), float("-inf"))
        return scores

    def choose(self, rows: slice, by_best_head: bool) -> Tensor:
        """Return the blocks that each row reads: [B, H or 1, R, top_k], see _best."""
        scores, slack = self.scores(rows), self._slack(rows)
        if by_best_head:
            # Logarithms: a probability that underflows would tie with hidden blocks.
            scores, slack = scores.log_softmax(-1).amax(1, True), slack.amax(1, True)
        return self._best(scores, slack)

    def choose_for_all(self) -> Tensor:
        """Return the blocks that each head's rows read together: [B, H, 1, top_k]."""
        best: Tensor | None = None
        for rows in self.rows(gather=False):
            here = self.scores(rows).log_softmax(-1).amax(2, keepdim=True)
            best = here if best is None else torch.maximum(best, here)
        assert best is not None
        return self._best(best, self._slack(ALL).amax(2, True))

    @torch.no_grad()
    def _slack(self, rows: slice) -> Tensor:
        """Return how far rounding may part a row's scores of one key: [B, H, R, 1]."""
        landmarks = self.store.landmarks[:, :, : self.count]
        longest = landmarks.to(self.q.dtype).norm(dim=-1).amax(-1)  # [B, Hkv]
        longest = longest.repeat_interleave(self.group, 1)[:, :, None, None]
        length = self.q[:, :, rows].norm(dim=-1, keepdim=True)
        slack: Tensor = _ROUNDING[landmarks.dtype] * self.scale * length * longest
        return slack.nan_to_num(0.0)

    def _best(self, scores: Tensor, slack: Tensor) -> Tensor:
        """Return the numbers in the store of the best blocks, rising; -1 first where too few."""
        number = newest_of_best(self._hide(scores), min(self.top_k, self.count), slack)
        number = number.masked_fill(number < self.store.first.view(-1, 1, 1, 1), -1)
        missing = self.top_k - number.shape[-1]
        number = torch.nn.functional.pad(number, (missing, 0), value=-1)
        return number.sort(-1).values

    def read(self, rows: slice, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of rows over the chosen blocks [B, H or 1, R or 1, top_k]."""
        heads = self.q.shape[1]
        shared = chosen.shape[2] == 1
        chosen = chosen.expand(-1, heads, -1, -1)
        landmarks, keys, values = self._fetch(chosen)
        q = self._at_slots(rows, chosen)
        # [B, H, R, top_k, K, 1], or all rows against one set: [B, H, 1, top_k, K, R].
        q = q.permute(0, 1, 3, 4, 2).unsqueeze(2) if shared else q.unsqueeze(-1)
        q = q * self.scale
        within = (keys @ q).softmax(-2)
        said = values.mT @ within
        gates = (landmarks.unsqueeze(-2) @ q).squeeze(-2)
        gates = gates.masked_fill((chosen < 0).unsqueeze(-1), float("-inf"))
        # A row without any block: a softmax over -inf alone is nan, and so is its gradient.
        empty = (chosen < 0).all(-1).unsqueeze(-1)
        gates = gates.masked_fill(empty.unsqueeze(-2), 0.0)
        lse = gates.logsumexp(-2, keepdim=True)
        out = (said * torch.exp(gates - lse).unsqueeze(-2)).sum(3)
        out = out.masked_fill(empty.unsqueeze(-1), 0.0)
        lse = lse.squeeze(-2).masked_fill(empty, float("-inf"))
        if shared:
            return out.squeeze(2).mT, lse.squeeze(2)
        return out.squeeze(-1), lse.squeeze(-1)

    def _at_slots(self, rows: slice, chosen: Tensor) -> Tensor:
        """Return rows as they stand to their chosen blocks' slots: [B, H, R, top_k, K].

        A block at slot s and a query at p: the block's keys turn by their place in the block only,
        the query by p - s * block. Only distances count, and the keys then serve every slot.
        """
        recent = chosen >= self.count - self.top_k
        slots = torch.arange(self.top_k, device=chosen.device) + recent
        away = self.places[rows].unsqueeze(-1) - torch.arange(self.top_k + 1) * self.block
        everywhere = rotate(self.q[:, :, rows].unsqueeze(-2), *self.rope(away))
        return everywhere.take_along_dim(slots.unsqueeze(-1), -2)

    def _fetch(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return landmark keys [..., K], keys and values [..., block - 1, K] of chosen blocks.

        chosen [B, H, R or 1, top_k]; its shape is the results' beginning. Keys are turned by their
        place in the block. What several rows chose is moved to the queries' device once.
        """
        store, device, wide = self.store, self.q.device, self.q.dtype
        batch, heads = chosen.shape[:2]
        room, kv_heads = store.k.shape[1:3]
        stream = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        head = torch.arange(heads, device=device).view(-1, 1, 1) // self.group
        index = (stream * room + chosen.clamp(min=0)) * kv_heads + head
        unique, where = torch.unique(index, return_inverse=True)
        there = unique.to(store.k.device)
        keys, values = (
            x.flatten(0, 2).index_select(0, there).to(device, wide) for x in (store.k, store.v)
        )
        head, number = unique % kv_heads, unique // kv_heads
        landmarks = store.landmarks[number // room, head, number % room].to(wide)
        cos, sin = self.rope(torch.arange(self.block))
        landmarks = rotate(landmarks, cos[-1], sin[-1])
        keys = rotate(keys, cos[:-1], sin[:-1])
        return landmarks[where], keys[where], values[where]
