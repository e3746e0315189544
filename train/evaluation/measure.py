"""Held-out loss by position, the same tokens with the memory on, off and shuffled.

A language model's loss falls as it reads on. Where it goes on falling beyond the first segment,
and no longer does once the memory is taken away or is another document's, the memory is at work.
All conditions read the same tokens in the same order, so their differences are free of the noise
between documents.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TypeAlias

import torch
from torch import Tensor

from data.index import Corpus
from data.loader import load
from data.streams import Batch, Streams
from model.attention import Layout, Whole
from model.decoder import Output
from model.memory.base import State
from parallel.mesh import Mesh
from parallel.slicing import take_slice
from train.evaluation.donors import Lanes, bytes_per_stream, exchange, has_window_and_more
from train.evaluation.positions import Condition, Evaluation
from train.evaluation.tally import Tally

Forward: TypeAlias = Callable[[Tensor, Tensor, State, Tensor, Tensor], Output]
"""forward(tokens, starts, state, labels, scale): the model, in whatever a run wraps it.

tokens, labels [B, N, S / cp] int64; starts [B, N] bool; state None: nothing read; scale 0-dim.
"""

Prepare: TypeAlias = Callable[[Batch], Batch]
"""prepare(batch): a batch whose segments may have other tokens among the text's, unlabelled."""

ALL: tuple[Condition, ...] = ("on", "off", "shuffled")

_SEED = 0
"""Of the documents' order: the same for all runs, so that their losses can be compared."""
_LANES_TOGETHER = 4
"""Lanes to find a donor among, where they are not more than a training step's call reads."""


def measure(
    forward: Forward,
    corpus: Corpus,
    *,
    segment_len: int,
    segments: int,
    lanes: int,
    tokens: int | None,
    conditions: Sequence[Condition] = ALL,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
    prepare: Prepare = lambda batch: batch,
    unit: int = 1,
    micro_batch: int = 1,
    device: torch.device | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Return the losses of about `tokens` held-out tokens (None: all), the same on all ranks.

    Reads `lanes` streams (see choose_lanes) from position 0 and carries the state from call to
    call; whole samples are read, at least one of each lane. Lanes are independent, so they are
    read group by group, and only one group's state is held. A call takes `segments` segments of
    micro_batch lanes; with "shuffled" among the conditions one segment of a group, which has at
    least 2 lanes and at most 4 or micro_batch. "beyond" is measured along with "shuffled" where
    the state has a window. prepare: what becomes of a batch before the model reads it, such as
    landmarks in it; segment_len counts tokens without them. unit: lanes of a call are a multiple
    of it, as those of a rank are. All ranks of the mesh call this
    together; with mesh None this process is alone and works on `device`.
    """
    streams = Streams(
        corpus.lengths, seed=_SEED, lanes=lanes, segment_len=segment_len, segments=segments
    )
    per_rank = lanes // (mesh.dp if mesh else 1)
    why_not = _why_not_shuffled(streams, per_rank) if "shuffled" in conditions else None
    shuffled = "shuffled" in conditions and why_not is None
    limit = max(2, micro_batch, min(_LANES_TOGETHER, micro_batch * segments))
    lowest = max(unit, 1 + shuffled)
    together = _divisor(per_rank, limit if shuffled else micro_batch, at_least=lowest, unit=unit)
    places = _places(prepare, segment_len)
    if shuffled and mesh and (together * len(places) // mesh.cp) % mesh.tp:
        # Sequence parallelism scatters the rows of a call, here of one segment.
        why_not = f"segment_len={segment_len} does not split over cp and tp one by one"
        shuffled, together = False, _divisor(per_rank, micro_batch, at_least=unit, unit=unit)
    reader = _Reader(
        forward,
        streams,
        mesh=mesh,
        layout=layout or Whole(),
        prepare=prepare,
        places=places,
        device=mesh.device if mesh else device or torch.device("cpu"),
        steps=count_steps(streams, tokens),
        conditions=[c for c in conditions if shuffled or c != "shuffled"],
    )
    for group in range(per_rank // together):
        batches = load(
            corpus,
            streams,
            position=0,
            dp_rank=(mesh.dp_rank if mesh else 0) * (per_rank // together) + group,
            dp_size=lanes // together,
            micro_batch=together,
            workers=workers,
            steps=reader.steps,
        )
        with torch.no_grad(), closing(batches):
            reader.read(_shown(batches, reader.steps, progress))
    return reader.result(why_not)


class _Reader:
    """Reads groups of lanes under all conditions, and adds up what it finds."""

    def __init__(
        self,
        forward: Forward,
        streams: Streams,
        *,
        mesh: Mesh | None,
        layout: Layout,
        prepare: Prepare,
        places: Tensor,
        device: torch.device,
        steps: int,
        conditions: Sequence[Condition],
    ) -> None:
        self.forward, self.streams, self.mesh, self.steps = forward, streams, mesh, steps
        self.layout, self.device, self.conditions = layout, device, conditions
        self.cp_rank = mesh.cp_rank if mesh else 0
        self.scale = torch.ones((), device=device)
        here = take_slice(places.view(1, 1, -1), layout, self.cp_rank).flatten()
        self.prepare = prepare
        self.tally = Tally(streams, steps, here.numpy(), mesh)
        self.seconds, self.read_tokens, self.calls = 0.0, 0, 0
        self.state_bytes = 0

    def read(self, batches: Iterator[list[Batch]]) -> None:
        """Read all steps of one group: batches of the same lanes, in order."""
        state: State = None
        lanes: Lanes | None = None
        together = 1 if "shuffled" in self.conditions else self.streams.segments
        for (batch,) in batches:
            if lanes is None:
                lanes = Lanes(self.streams, batch.first_position, len(batch.starts))
            for first in range(0, self.streams.segments, together):
                part = self.prepare(_part(batch, first, together))
                state = self._segments(part, first, state, lanes)

    def _segments(self, batch: Batch, first: int, state: State, lanes: Lanes) -> State:
        """Measure one call's segments under each condition; return the memory's state after."""
        segment = batch.first_position // self.streams.lanes * self.streams.segments + first
        here = [take_slice(x, self.layout, self.cp_rank) for x in (batch.tokens, batch.labels)]
        tokens, labels = (x.to(self.device) for x in here)
        starts = batch.starts.to(self.device)

        def losses(starts: Tensor, state: State) -> Tensor:
            return self.forward(tokens, starts, state, labels, self.scale).token_losses

        found: dict[Condition, Tensor] = {}
        after: State = None
        measured = None
        if "on" in self.conditions:
            began = time.perf_counter()
            output = self.forward(tokens, starts, state, labels, self.scale)
            after, found["on"] = output.state, output.token_losses.cpu()  # waits for a GPU
            self._count(batch, time.perf_counter() - began, after)
        if "off" in self.conditions:
            found["off"] = losses(torch.ones_like(starts), None)
        if "shuffled" in self.conditions:
            # Every rank calls the model as often, donors or not: ranks wait for one another.
            donors, measured = lanes.donors(segment)
            others: list[Condition] = ["shuffled"]
            if has_window_and_more(after):
                others.append("beyond")
            for name in others:
                found[name] = found["on"]
                if state is not None:
                    theirs = exchange(state, donors, keep_window=name == "beyond")
                    found[name] = losses(starts, theirs)
        self.tally.add(batch, segment, here[1], found, measured)
        return after

    def _count(self, batch: Batch, seconds: float, state: State) -> None:
        self.calls += 1
        if self.calls > 1:  # the first call allocates, and may compile
            self.seconds += seconds
            self.read_tokens += batch.starts.numel() * self.streams.segment_len
        if state is not None:
            self.state_bytes = max(self.state_bytes, bytes_per_stream(state))

    def result(self, why_not: str | None) -> Evaluation:
        """Return what was found, summed over ranks: all of them call this together."""
        found = self.tally.result()
        late = slice(self.tally.late, None)
        if "shuffled" in found and not any(found["shuffled"].counts[late]):
            if any(found["on"].counts[late]):
                why_not = "cannot be shuffled: streams side by side were in the same document"
            found = {name: found[name] for name in ("on", "off") if name in found}
        rate = self.read_tokens / self.seconds if self.seconds else math.nan
        return Evaluation(
            **found,
            unshuffled=why_not,
            tokens_per_s=rate * (self.mesh.dp if self.mesh else 1),
            state_bytes=self.state_bytes,
        )


def choose_lanes(documents: int, batch_size: int, dp: int = 1, unit: int = 1) -> int:
    """Return the streams to read: about batch_size, fewer of fewer documents, multiples of unit.

    An even number for each rank where there are documents for 2, so that memories can be
    exchanged; the same whatever the memory, so that losses can be compared (but for a unit over 2).
    """
    each = min(documents, max(batch_size, 2 * dp)) // dp
    even = max(1, each - each % 2)
    return max(unit, even - even % unit) * dp


def count_steps(streams: Streams, tokens: int | None) -> int:
    """Return the steps, of one sample of each lane, that read about `tokens` tokens."""
    if tokens is None:
        return streams.steps_per_epoch
    per_step = streams.lanes * streams.segments * streams.segment_len
    return min(max(1, round(tokens / per_step)), streams.steps_per_epoch)


def _why_not_shuffled(streams: Streams, lanes: int) -> str | None:
    """Return why no memory can be exchanged between a rank's lanes, None where it can."""
    if streams.documents == 1:
        return "cannot be shuffled: the data is one document"
    if lanes == 1:
        return "cannot be shuffled: one stream a rank; give it more documents or fewer ranks"
    return None


def _places(prepare: Prepare, segment_len: int) -> Tensor:
    """Return which of the segment's text tokens each of the model's tokens is, [S'] int64.

    0 for tokens that are no text: they have no label, so nothing is counted there.
    """
    shape = (1, 1, segment_len)
    nothing = torch.zeros(shape[:2], dtype=torch.int64)
    probe = Batch(
        torch.zeros(shape, dtype=torch.int64),
        torch.arange(segment_len).view(shape),
        nothing.bool(),
        nothing,
        0,
    )
    return prepare(probe).labels.flatten().clamp_min(0)


def _divisor(number: int, limit: int, at_least: int = 1, unit: int = 1) -> int:
    """Return the largest divisor, a multiple of unit, from at_least to limit, else the next."""
    divisors = [n for n in range(at_least, number + 1) if number % n == 0 and n % unit == 0]
    return max((n for n in divisors if n <= limit), default=divisors[0])


def _part(batch: Batch, first: int, count: int) -> Batch:
    """Return `count` segments of a batch."""
    some = slice(first, first + count)
    return batch._replace(
        tokens=batch.tokens[:, some],
        labels=batch.labels[:, some],
        starts=batch.starts[:, some],
        offsets=batch.offsets[:, some],
    )


def _shown(batches: Iterator[list[Batch]], steps: int, progress: bool) -> Iterator[list[Batch]]:
    """Return the batches, counted by a bar on a terminal."""
    from tqdm import tqdm

    # disable=None: no bar where stderr is a file
    disable = None if progress else True
    return iter(tqdm(batches, "evaluate", steps, leave=False, unit="step", disable=disable))
