"""Which tokens of a packed segment are one document's: attention inside documents, without a mask.

A document is a run of neighbouring tokens, so on every rank its tokens are a run of that rank's
slice, however the segment is cut. What one slice reads of another is causal over equal places, or
everything (attention.Span); so is what a document's run reads of the same document's run. The
mask of documents is therefore a list of calls of the kernel that there is anyway: no scores are
computed to be hidden, and a segment that holds one document takes the same call as ever.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention import Layout
from model.kernels import Kernel
from model.precision import sum_dtype


class Block(NamedTuple):
    """A run of queries that reads a run of keys, in one or more segments at the same places."""

    segments: list[int]  # of B * N
    queries: slice  # of the span's
    keys: slice


class Packed:
    """The documents of B * N packed segments, and where each rank has them."""

    def __init__(self, whole: Tensor, positions: Tensor, device: torch.device) -> None:
        """Take whole [B, N, S] int64, CPU: each token's document in its segment, rising from 0.

        positions [S / size]: the places of this rank's tokens.
        """
        self.whole = whole
        here = whole.index_select(2, positions)
        self.first = (here == 0).to(device)  # [B, N, S / size] bool: of a segment's first document
        self._ids: NDArray[np.int64] = whole.flatten(0, 1).numpy()
        self._blocks: dict[tuple[int, int, int], list[Block]] = {}

    def places(self, positions: Tensor) -> Tensor:
        """Return the place inside its document, of this segment, of each token: [B, N, positions].

        Of a document that began earlier the place in the segment.
        """
        place = torch.arange(self.whole.shape[2]).expand_as(self.whole)
        begins = torch.zeros_like(self.whole)
        begins[..., 1:] = torch.where(self.whole.diff() != 0, place[..., 1:], 0)
        return (place - begins.cummax(-1).values).index_select(2, positions)

    def blocks(self, layout: Layout, query_rank: int, key_rank: int, number: int) -> list[Block]:
        """Return what a span, the number-th of layout.spans, holds of reads inside documents."""
        key = (query_rank, key_rank, number)
        if key not in self._blocks:
            segment_len = self._ids.shape[1]
            queries, keys = (
                self._ids[:, layout.positions(rank, segment_len).numpy()]
                for rank in (query_rank, key_rank)
            )
            span = layout.spans(query_rank, key_rank, queries.shape[1])[number]
            self._blocks[key] = _common(queries[:, span.queries], keys[:, span.keys])
        return self._blocks[key]


def check_documents(documents: Tensor, starts: Tensor) -> None:
    """Raise ValueError where documents [B, N, S] are no runs from 0, or are written to a memory.

    starts [B, N]: a segment behind one of several documents must begin a document, for what that
    one leaves in the memory is no document's past. (Not looked at on a GPU: it would wait.)
    """
    if documents.numel() and (documents[..., 0].any() or (documents.diff() < 0).any()):
        raise ValueError(
            "documents must be 0 at the first token of a segment and rise by 1 where the next"
            " document begins; give the index of each token's document in its segment"
        )
    if starts.device.type == "cpu":
        several = documents[..., -1] > 0
        if (several[:, :-1] & ~starts[:, 1:]).any():
            raise ValueError(
                "a segment of several documents is followed by one that starts none; set starts"
                " there, as data.packing does"
            )


def _common(queries: NDArray[np.int64], keys: NDArray[np.int64]) -> list[Block]:
    """Return one block for each document that has both; queries, keys [segments, tokens]."""
    of_queries, of_keys = _runs(queries), _runs(keys)
    _, a, b = np.intersect1d(of_queries[0], of_keys[0], assume_unique=True, return_indices=True)
    found: dict[tuple[int, int, int, int], list[int]] = {}
    for i, j in zip(a.tolist(), b.tolist(), strict=True):
        segment, *run = of_queries[1][i]
        found.setdefault((*run, *of_keys[1][j][1:]), []).append(segment)
    return [
        Block(segments, slice(*places[:2]), slice(*places[2:]))
        for places, segments in found.items()
    ]


def _runs(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[tuple[int, int, int]]]:
    """Return each run of equal ids in a row: a number of its own, and (row, start, stop)."""
    rows, length = ids.shape
    if not ids.size:
        return np.zeros(0, dtype=np.int64), []
    begins = np.ones(ids.shape, dtype=np.bool_)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    row, start = np.nonzero(begins)
    ends = np.append(np.flatnonzero(begins)[1:], rows * length) - row * length
    # Unique over rows, and the same for the same document whatever part of a row is looked at.
    number = row * (np.int64(1) << 32) + ids[row, start]
    return number, list(zip(row.tolist(), start.tolist(), ends.tolist(), strict=True))


def forward_blocks(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, causal: bool, blocks: list[Block]
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of reads inside documents; lse -inf where a query reads nothing.

    q [B * N, H, Sq, K]; k, v [B * N, Hkv, Sk, K].
    """
    wide = sum_dtype(q)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    for block in blocks:
        rows, keys = block.queries, block.keys
        found = kernel.forward(
            _take(q, block.segments, rows),
            _take(k, block.segments, keys),
            _take(v, block.segments, keys),
            causal,
        )
        _put(out, block.segments, rows, found[0])
        _put(lse, block.segments, rows, found[1])
    return out, lse


def backward_blocks(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    blocks: list[Block],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of these reads; out, lse: of the whole fold. Blocks share no row."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for block in blocks:
        segments, rows, keys = block
        grads = kernel.backward(
            _take(dout, segments, rows),
            _take(q, segments, rows),
            _take(k, segments, keys),
            _take(v, segments, keys),
            _take(out, segments, rows),
            _take(lse, segments, rows),
            causal,
        )
        for whole, part, places in zip((dq, dk, dv), grads, (rows, keys, keys), strict=True):
            _put(whole, segments, places, part)
    return dq, dk, dv


def _take(x: Tensor, segments: list[int], places: slice) -> Tensor:
    """Return x [B * N, H, S, ...] at some segments and places; a view where it can be one."""
    if len(segments) == 1:
        return x[segments[0] : segments[0] + 1, :, places]
    if len(segments) == len(x):
        return x[:, :, places]
    return x[:, :, places][segments]


def _put(x: Tensor, segments: list[int], places: slice, part: Tensor) -> None:
    if len(segments) == 1:
        x[segments[0], :, places] = part[0]
    elif len(segments) == len(x):
        x[:, :, places] = part
    else:
        x[:, :, places][segments] = part
