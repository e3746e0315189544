"""Adding up losses by position and by passage, over segments, lanes and ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data.streams import IGNORE, Batch, Streams
from parallel.mesh import Mesh
from train.evaluation.positions import Condition, Part, PositionLosses, bucket_edges

_Sums = dict[str, NDArray[np.float64]]


class Tally:
    """Sums of one evaluation, on the CPU, in float64; the same for every condition.

    Of each segment beyond a passage's first it keeps the sum: all of such a segment lies in one
    bucket, so passages and buckets can be put together at the end.
    """

    def __init__(
        self, streams: Streams, steps: int, places: NDArray[np.int64], mesh: Mesh | None
    ) -> None:
        self.lanes, self.segment_len, self.mesh = streams.lanes, streams.segment_len, mesh
        self.length = steps * streams.segments  # of a lane, in segments
        self.places = places  # of this rank's tokens in their segment
        assert streams.longest is not None
        self.edges = bucket_edges(streams.segment_len, streams.longest)
        self.late = self.edges.index(streams.segment_len)  # the first bucket with a past
        self.passage = np.full(self.lanes, -1)
        self.begin = np.zeros(self.lanes, dtype=np.int64)
        # Of each segment, where this rank read it: 1 + its passage in the lane, and its bucket.
        self.where = np.zeros((2, self.lanes, self.length))
        self.buckets: _Sums = {}  # by condition, [2, buckets]: loss, tokens
        self.segments: _Sums = {}  # by condition, [2, lanes, length]: loss, tokens

    def add(
        self,
        batch: Batch,
        segment: int,
        labels: Tensor,
        losses: Mapping[Condition, Tensor],
        shuffled: NDArray[np.bool_] | None = None,
    ) -> None:
        """Add a batch: labels (CPU) and losses [B, N, S / cp] of this rank's tokens.

        segment: the number in its lane of the batch's first. shuffled [B]: the lanes whose
        memory was another's, for which alone shuffled losses count, and memory on beside them.
        """
        first = batch.first_position % self.lanes
        lanes = np.arange(first, first + len(batch.starts))
        wanted = (labels != IGNORE).numpy()
        values: _Sums = {name: x.double().cpu().numpy() for name, x in losses.items()}
        masks: dict[str, NDArray[np.bool_]] = dict.fromkeys(values, wanted)
        if shuffled is not None:
            some = wanted & shuffled[:, None, None]
            masks |= {name: some for name in ("shuffled", "beyond") if name in values}
            values, masks = values | {"paired": values["on"]}, masks | {"paired": some}
        starts, offsets = batch.starts.numpy(), batch.offsets.numpy()
        for n in range(starts.shape[1]):
            self.passage[lanes] += starts[:, n]
            self.begin[lanes] = np.where(starts[:, n], offsets[:, n], self.begin[lanes])
            read = offsets[:, n] - self.begin[lanes]  # before this segment
            bucket = np.searchsorted(self.edges, read, side="right") - 1
            if self.mesh is None or self.mesh.cp_rank == 0:  # once, where ranks are summed
                self.where[:, lanes, segment + n] = self.passage[lanes] + 1, bucket
            for name, loss in values.items():
                mask = masks[name][:, n]
                kept = np.where(mask, loss[:, n], 0.0)
                self._add_positions(name, read, kept, mask)
                sums = self._of(self.segments, name, self.where.shape)
                late = read >= self.segment_len
                sums[:, lanes, segment + n] += kept.sum(-1) * late, mask.sum(-1) * late

    def _add_positions(
        self,
        name: str,
        read: NDArray[np.int64],
        losses: NDArray[np.float64],
        wanted: NDArray[np.bool_],
    ) -> None:
        positions = (read[:, None] + self.places)[wanted]
        bucket = np.searchsorted(self.edges, positions, side="right") - 1
        length = len(self.edges) - 1
        sums = self._of(self.buckets, name, (2, length))
        sums[0] += np.bincount(bucket, weights=losses[wanted], minlength=length)
        sums[1] += np.bincount(bucket, minlength=length)

    def _of(self, sums: _Sums, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return sums.setdefault(name, np.zeros(shape))

    def result(self) -> dict[str, PositionLosses]:
        """Return the sums over all ranks, by condition: DP ranks have lanes, CP ranks tokens."""
        names = list(self.buckets)  # in the order of the calls, which is that of every rank
        arrays = [self.where]
        arrays += [self.buckets[name] for name in names] + [self.segments[name] for name in names]
        if self.mesh is not None:
            flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
            total = flat.to(self.mesh.device)
            dist.all_reduce(total, group=self.mesh.zero_group)
            ends = np.cumsum([array.size for array in arrays])[:-1]
            parts = np.split(total.cpu().numpy(), ends)
            arrays = [part.reshape(a.shape) for part, a in zip(parts, arrays, strict=True)]
        where, buckets, segments = arrays[0], arrays[1 : 1 + len(names)], arrays[1 + len(names) :]
        used = 1 + max(int(counts.nonzero()[0].max(initial=-1)) for _, counts in buckets)
        return {
            name: PositionLosses(
                condition="on" if name == "paired" else name,  # type: ignore[arg-type]
                segment_len=self.segment_len,
                edges=self.edges[: used + 1],
                sums=tuple(losses[:used].tolist()),
                counts=tuple(counts[:used].astype(int).tolist()),
                parts=self._parts(where, late),
            )
            for name, (losses, counts), late in zip(names, buckets, segments, strict=True)
        }

    def _parts(self, where: NDArray[np.float64], late: NDArray[np.float64]) -> tuple[Part, ...]:
        """Return what each passage has in each bucket, of segments [2, lanes, length]."""
        lane, segment = late[1].nonzero()
        passage = lane * (self.length + 1) + where[0, lane, segment].astype(int)
        width = len(self.edges)
        keys = passage * width + where[1, lane, segment].astype(int)
        found, places = np.unique(keys, return_inverse=True)
        losses, tokens = (
            np.bincount(places, weights=values[lane, segment], minlength=len(found))
            for values in late
        )
        return tuple(
            Part(int(key) // width, int(key) % width, float(loss), int(count))
            for key, loss, count in zip(found, losses, tokens, strict=True)
        )
