"""The two exchanges of context parallelism: a ring, and an all-gather.

Ring (Liu et al. 2023): at step t rank r holds the keys of rank r - t; the next hop is in flight
while this one is computed. In backward the gradients of keys travel one hop behind them, in
float32, and the last hop brings them home, where a rank's own share waits. That share is computed
in two halves of the key heads (of one: at once), beside the first hop and beside the last: so no
hop is without work. Only heads as stored travel (grouped heads are not expanded).

All-gather (Llama 3): all keys at once; backward gathers again and reduce-scatters the gradients.
The communication is exposed, but it is one message; good for small groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from model.attention import Exchange, Visit, VisitBack, merge
from model.precision import sum_dtype

ALL = slice(None)


class _Group:
    """What both exchanges share: sums and the merge of slot attention."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def combine(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merge the ranks' (out [..., K], lse [...]) in rank order: the same bits everywhere."""
        mine = torch.cat((out.to(lse.dtype), lse.unsqueeze(-1)), -1).contiguous()
        parts = self._gather(mine)
        result = (parts[0, ..., :-1], parts[0, ..., -1])
        for part in parts[1:]:
            result = merge(result, (part[..., :-1], part[..., -1]))
        return result

    def _gather(self, mine: Tensor) -> Tensor:
        """Return [size, *mine.shape]: every rank's tensor."""
        held = mine.new_empty((self.size * mine.shape[0], *mine.shape[1:]))
        dist.all_gather_into_tensor(held, mine, group=self.group)
        ranks: Tensor = held.unflatten(0, (self.size, -1))
        return ranks

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks, added in float32."""
        total = x.to(sum_dtype(x), copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(x.dtype)


class Ring(_Group):
    """Point-to-point hops."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group)
        ranks = dist.get_process_group_ranks(group)
        self.next, self.previous = ranks[(self.rank + 1) % self.size], ranks[self.rank - 1]

    def visit(self, k: Tensor, v: Tensor, step: Visit) -> None:
        """Call step(source, k, v) for each rank's keys."""
        held = torch.stack((k, v))
        for t in range(self.size):
            hop = self.pass_on(held) if t < self.size - 1 else None
            step((self.rank - t) % self.size, held[0], held[1])
            if hop is not None:
                held = hop.wait()

    def visit_back(self, k: Tensor, v: Tensor, step: VisitBack) -> tuple[Tensor, Tensor]:
        """Call step(source, k, v, heads) -> (dk, dv); return this rank's dk, dv, summed."""
        wide = sum_dtype(k)
        home = torch.empty((2, *k.shape), dtype=wide, device=k.device)

        def stay(heads: slice) -> None:
            if heads.start < heads.stop:
                home[0][:, :, heads], home[1][:, :, heads] = step(self.rank, k, v, heads)

        middle = (k.shape[2] + 1) // 2
        held = torch.stack((k, v))
        grads: Hop | None = None
        for t in range(self.size):
            hop = self.pass_on(held) if t < self.size - 1 else None
            if t == 0:
                stay(slice(0, middle))
            else:
                dk, dv = step((self.rank - t) % self.size, held[0], held[1], ALL)
                mine = _stack_wide(dk, dv)
                if grads is not None:
                    mine += grads.wait()
                grads = self.pass_on(mine)
            if hop is not None:
                held = hop.wait()
        stay(slice(middle, k.shape[2]))
        if grads is not None:
            home += grads.wait()
        return home[0], home[1]

    def pass_on(self, x: Tensor) -> Hop:
        """Send x to the next rank, and return what the one before sends, under way."""
        received = torch.empty_like(x)
        ops = [
            dist.P2POp(dist.isend, x, self.next, self.group),
            dist.P2POp(dist.irecv, received, self.previous, self.group),
        ]
        return Hop(x, received, dist.batch_isend_irecv(ops))


def _stack_wide(a: Tensor, b: Tensor) -> Tensor:
    """Return [2, ...] of both, in float32 or wider, in one pass."""
    wide = sum_dtype(a)
    both = torch.empty((2, *a.shape), dtype=wide, device=a.device)
    both[0], both[1] = a, b
    return both


class Waiting(Protocol):
    """What a hop waits for: a `dist.Work`."""

    def wait(self) -> object:
        """Return when it is done; on a GPU, let what comes later be done behind it."""
        ...


class Hop:
    """A message in flight; keeps what is sent alive until it has arrived."""

    def __init__(self, sent: Tensor, received: Tensor, works: Sequence[Waiting]) -> None:
        self.sent, self.received, self.works = sent, received, works

    def wait(self) -> Tensor:
        """Return what has arrived."""
        for work in self.works:
            work.wait()
        return self.received


class AllGather(_Group):
    """One gather forward; in backward one gather and one reduce-scatter."""

    def visit(self, k: Tensor, v: Tensor, step: Visit) -> None:
        """Call step(source, k, v) for each rank's keys, this rank's own first."""
        held = self._gather(torch.stack((k, v)))
        for t in range(self.size):
            source = (self.rank - t) % self.size
            step(source, held[source, 0], held[source, 1])

    def visit_back(self, k: Tensor, v: Tensor, step: VisitBack) -> tuple[Tensor, Tensor]:
        """Call step(source, k, v, heads) -> (dk, dv); return this rank's dk, dv, summed."""
        held = self._gather(torch.stack((k, v)))
        wide = sum_dtype(k)
        grads = torch.empty(held.shape, dtype=wide, device=k.device)
        for source in range(self.size):
            dk, dv = step(source, held[source, 0], held[source, 1], ALL)
            grads[source, 0], grads[source, 1] = dk, dv
        home = torch.empty(grads.shape[1:], dtype=wide, device=k.device)
        dist.reduce_scatter_tensor(home, grads.flatten(0, 1), group=self.group)
        return home[0], home[1]


def choose_exchange(name: str, group: ProcessGroup) -> Exchange:
    """Return the exchange `ring` or `all_gather` over a group."""
    exchanges: dict[str, type[Ring] | type[AllGather]] = {"ring": Ring, "all_gather": AllGather}
    return exchanges[name](group)
