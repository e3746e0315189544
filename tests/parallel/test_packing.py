"""Packed documents over context-parallel ranks in float64: what each is read as by itself."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.decoder import Decoder
from model.local import FoldedSequence
from parallel.ring import choose_exchange
from parallel.slicing import choose_layout, take_slice
from tests.compare import assert_each
from tests.model.memories import IN_A_LAYER
from tests.model.packed import SEGMENT_LEN, Packed, packed_batch, read_alone
from tests.model.small import build, config_of, gradients
from tests.ranks import run_ranks

MEMORIES = (
    "none",
    "window-2",
    "fam-norm-window-1-current",
    "infini-delta-window-2",
    "abc-window-1",
)


def spread(model: Decoder, batch: Packed, layout: Any) -> dict[str, Tensor]:
    """Return each document's losses and the gradients of one process, from this rank's slice."""
    rank = dist.get_rank()
    tokens, labels = (take_slice(x, layout, rank) for x in (batch.tokens, batch.labels))
    output = model(
        tokens, batch.starts, labels=labels, scale=torch.ones(()), documents=batch.documents
    )
    output.loss.backward()
    losses = torch.zeros(batch.tokens.shape, dtype=output.token_losses.dtype)
    losses[:, :, layout.positions(rank, SEGMENT_LEN)] = output.token_losses.detach()
    found = gradients(model) | {"losses": losses}
    for x in found.values():
        dist.all_reduce(x)
    flat = found.pop("losses").flatten(1)
    return found | {
        f"losses of {run}": flat[run[0], run[1] : run[1] + run[2]] for run in batch.runs
    }


def on_a_rank(exchange: str, layout_name: str) -> dict[str, dict[str, Tensor]]:
    layout = choose_layout(layout_name, dist.get_world_size())
    sequence = FoldedSequence(layout, choose_exchange(exchange, dist.group.WORLD))
    found = {}
    for name in MEMORIES:
        model = build(config_of(IN_A_LAYER[name]))
        model.sequence = sequence
        found[name] = spread(model, packed_batch(), layout)
    return found


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("size", "exchange", "layout"),
    [
        (2, "ring", "zigzag"),
        (2, "all_gather", "contiguous"),
        (4, "ring", "contiguous"),
        (4, "all_gather", "zigzag"),
    ],
)
def test_packed_documents_over_ranks_are_read_as_each_alone_on_one(
    size: int, exchange: str, layout: str
) -> None:
    ranks = run_ranks(size, on_a_rank, exchange, layout)
    for name in MEMORIES:
        expected = read_alone(build(config_of(IN_A_LAYER[name])), packed_batch())
        for rank in ranks:
            assert_each(rank[name], expected, 1e-10)
