"""Packed segments, and the same documents each in segments of its own."""

from typing import NamedTuple

import torch
from torch import Tensor

from model.decoder import Decoder, Output
from model.loss import IGNORE
from tests.model.small import VOCAB, gradients

SEGMENT_LEN = 16

LANES = (
    ((21, 6, 4), (8, 7), (16,)),
    ((2, 1, 11, 2), (37, 5, 4)),
)
"""For each lane its packs: the documents' lengths, of which the first alone may be long."""


class Packed(NamedTuple):
    """A packed batch of 2 lanes of 4 segments, and where its documents lie."""

    tokens: Tensor  # [B, N, S]
    labels: Tensor
    starts: Tensor
    documents: Tensor
    runs: list[tuple[int, int, int]]  # (lane, first token, length), of each document


def packed_batch(seed: int = 0) -> Packed:
    """Return random documents; their last tokens, and padding, have no label."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LANES), 4 * SEGMENT_LEN)
    tokens = torch.randint(0, VOCAB, shape, generator=generator)
    labels = torch.full(shape, IGNORE)
    drawn = torch.randint(0, VOCAB, shape, generator=generator)
    documents, starts = torch.zeros(shape, dtype=torch.int64), torch.zeros(len(LANES), 4).bool()
    runs = []
    for lane, packs in enumerate(LANES):
        begin = 0
        for pack in packs:
            starts[lane, begin // SEGMENT_LEN] = True
            for number, length in enumerate(pack):
                runs.append((lane, begin, length))
                labels[lane, begin : begin + length - 1] = drawn[lane, begin : begin + length - 1]
                end = -(-(begin + length) // SEGMENT_LEN) * SEGMENT_LEN
                last = max(begin, end - SEGMENT_LEN)
                documents[lane, last:end] = number  # padding is the last document's
                begin += length
            begin = -(-begin // SEGMENT_LEN) * SEGMENT_LEN
    cut = (len(LANES), 4, SEGMENT_LEN)
    return Packed(tokens.view(cut), labels.view(cut), starts, documents.view(cut), runs)


def read_packed(model: Decoder, batch: Packed) -> dict[str, Tensor]:
    """Return each document's token losses, and the gradient of their sum."""
    output: Output = model(
        batch.tokens,
        batch.starts,
        labels=batch.labels,
        scale=torch.ones(()),
        documents=batch.documents,
    )
    output.loss.backward()
    losses = output.token_losses.detach().flatten(1)
    return gradients(model) | {
        f"losses of {run}": losses[run[0], run[1] : run[1] + run[2]] for run in batch.runs
    }


def read_alone(model: Decoder, batch: Packed) -> dict[str, Tensor]:
    """Return what read_packed does, from one call for each document."""
    found = {}
    for run in batch.runs:
        lane, begin, length = run
        count = -(-length // SEGMENT_LEN)
        tokens = torch.zeros(1, count * SEGMENT_LEN, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORE)
        tokens[0, :length] = batch.tokens[lane].flatten()[begin : begin + length]
        labels[0, :length] = batch.labels[lane].flatten()[begin : begin + length]
        starts = torch.zeros(1, count, dtype=torch.bool)
        starts[0, 0] = True
        cut = (1, count, SEGMENT_LEN)
        output = model(tokens.view(cut), starts, labels=labels.view(cut), scale=torch.ones(()))
        output.loss.backward()
        found[f"losses of {run}"] = output.token_losses.detach().flatten()[:length]
    return gradients(model) | found
