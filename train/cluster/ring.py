"""How fast neighbouring nodes add up a tensor: a figure for each pair of the ring, in GB/s.

Every pair measures by itself while other pairs do, in three rounds at most, so that 64 nodes take
no longer than four; and a node that does not answer costs its neighbours a timeout, not the rest.
"""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S = 15.0
"""Of a pair: to meet, and for each product."""
_REPEATS = 3


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return the pairs of neighbours in a ring, so that nobody is in two pairs of a round."""
    if count < 2:
        return []
    pairs = [(i, (i + 1) % count) for i in range(count if count > 2 else 1)]
    last = [pairs.pop()] if count % 2 and count > 1 else []
    return [found for found in (pairs[0::2], pairs[1::2], last) if found]


def measure_ring(nodes: Sequence[str], here: str, store: Store) -> dict[str, float | None]:
    """Return this node's pairs, `a b`, and their GB/s (None: no answer).

    nodes: in the ring's order. Every node calls this with the same store.
    """
    mine: dict[str, float | None] = {}
    for pairs in rounds(len(nodes)):
        for a, b in pairs:
            if here in (nodes[a], nodes[b]):
                name = f"{nodes[a]} {nodes[b]}"
                mine[name] = _measure(PrefixStore(name, store), int(here == nodes[b]))
    return mine


def _measure(store: Store, rank: int) -> float | None:
    """Return a pair's rate: bytes of the tensor over the seconds of one all-reduce."""
    limit = timedelta(seconds=TIMEOUT_S)
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    numel = (256 if cuda else 16) << 18  # MiB of float32
    with contextlib.suppress(RuntimeError):
        store.set_timeout(limit)
        group: Any
        if cuda:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            group = dist.ProcessGroupNCCL(store, rank, 2, options)
        else:
            group = dist.ProcessGroupGloo(store, rank, 2, limit)
        tensor = torch.zeros(numel, device=device)
        group.allreduce([tensor]).wait(limit)  # connects
        best = float("inf")
        for _ in range(_REPEATS):
            _wait(device)
            began = time.perf_counter()
            group.allreduce([tensor]).wait(limit)
            _wait(device)
            best = min(best, time.perf_counter() - began)
        return 4 * numel / best / 1e9
    return None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
