"""The exchange of keys alone: does each rank get all, and do dK and dV come home whole?

In bfloat16 the sums of a model's gradients hide how they were added; here the summands are known,
and their sum must be exact to float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import Alone
from model.interfaces import Sequence
from model.local import FoldedSequence

SHAPE = (2, 3, 2, 4, 8)  # [B, N, H, S, K]


class Probe(NamedTuple):
    """The largest relative error, and of what."""

    error: float
    name: str


def probe(sequence: Sequence, precision: str) -> Probe | None:
    """Return how far the exchange's keys, dK and dV are from what was sent, in the run's type.

    None where a rank has all keys itself. Every rank of the exchange calls this together.
    """
    exchange = sequence.exchange if isinstance(sequence, FoldedSequence) else Alone()
    rank, size = exchange.rank, exchange.size
    if size == 1:
        return None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    keys = [(_draw(source, 0, dtype), _draw(source, 1, dtype)) for source in range(size)]
    seen: dict[int, float] = {}

    def step(source: int, k: Tensor, v: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        seen[source] = max(_error(k, keys[source][0]), _error(v, keys[source][1]))
        number = 2 + 2 * (rank * size + source)
        return _draw(number, 2, dtype)[:, :, heads], _draw(number, 3, dtype)[:, :, heads]

    dk, dv = exchange.visit_back(*keys[rank], step)
    senders = [2 + 2 * (sender * size + rank) for sender in range(size)]
    found = [Probe(max(seen.values()) if len(seen) == size else float("inf"), "keys")]
    for name, grad, kind in (("dK", dk, 2), ("dV", dv, 3)):
        total = torch.stack([_draw(number, kind, dtype).double() for number in senders]).sum(0)
        found.append(Probe(_error(grad, total), name))
    return max(found, key=lambda each: each.error)


def _draw(number: int, kind: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * kind + number)
    return torch.randn(SHAPE, generator=generator).to(dtype)


def _error(actual: Tensor, expected: Tensor) -> float:
    apart = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(apart.nan_to_num(nan=float("inf")))
