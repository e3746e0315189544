"""Held-out loss by position in the document, with the memory and without.

A language model's loss falls as it reads on. Where it goes on falling beyond the first segment,
and no longer does once the memory is taken away, the memory is at work. Both runs read the same
tokens in the same order, so their difference is free of the noise between documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data.index import Corpus
from data.loader import load
from data.streams import IGNORE, Batch, Streams
from model.attention import Layout, Whole
from model.decoder import Output
from model.memory.base import State
from parallel.mesh import Mesh
from parallel.slicing import take_slice
from train.positions import PositionLosses, bucket_edges, describe_gain, table

if TYPE_CHECKING:
    from model.decoder import Decoder
    from train.config import Config

Forward: TypeAlias = Callable[[Tensor, Tensor, list[State] | None, Tensor, Tensor], Output]
"""forward(tokens, starts, state, labels, scale): the model, in whatever a run wraps it.

tokens, labels [B, N, S / cp] int64; starts [B, N] bool; scale 0-dim.
"""

_SEED = 0
"""Of the documents' order: the same for all runs, so that their losses can be compared."""


def evaluate(
    forward: Forward,
    corpus: Corpus,
    *,
    segment_len: int,
    segments: int,
    lanes: int,
    tokens: int | None,
    memory: bool,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
    micro_batch: int = 1,
    device: torch.device | None = None,
    workers: int = 0,
    progress: bool = False,
) -> PositionLosses:
    """Return the losses of about `tokens` held-out tokens (None: all), the same on all ranks.

    Reads `lanes` streams (see choose_lanes) from position 0, `segments` segments of each in one
    call of forward, and carries the state from call to call. memory=False: nothing is carried
    from segment to segment, no window either. Whole samples are read, at least one of each
    lane. All ranks of the mesh call this together; with mesh None this process is alone and
    works on `device`. micro_batch: lanes in a call, at most; only their state is held.
    """
    streams = Streams(
        corpus.lengths, seed=_SEED, lanes=lanes, segment_len=segment_len, segments=segments
    )
    steps = count_steps(streams, tokens)
    dp, dp_rank, cp_rank = (mesh.dp, mesh.dp_rank, mesh.cp_rank) if mesh else (1, 0, 0)
    device = mesh.device if mesh else device or torch.device("cpu")
    layout = layout or Whole()
    tally = _Tally(streams, steps, layout.positions(cp_rank, segment_len).numpy())
    scale = torch.ones((), device=device)
    micro_batch = _largest_divisor(lanes // dp, micro_batch)
    groups = lanes // dp // micro_batch
    # Lanes are independent: one group after the other, so that one group's state is held at a time.
    for group in range(groups):
        state: list[State] | None = None
        batches = load(
            corpus,
            streams,
            position=0,
            dp_rank=dp_rank * groups + group,
            dp_size=dp * groups,
            micro_batch=micro_batch,
            workers=workers,
            steps=steps,
        )
        with torch.no_grad(), closing(batches):
            for (batch,) in _shown(batches, steps, progress):
                local, labels = (
                    take_slice(x, layout, cp_rank) for x in (batch.tokens, batch.labels)
                )
                starts = batch.starts if memory else torch.ones_like(batch.starts)
                output = forward(
                    local.to(device), starts.to(device), state, labels.to(device), scale
                )
                state = output.state if memory else None
                tally.add(batch, labels, output.token_losses)
    return tally.result(memory, mesh)


def choose_lanes(documents: int, batch_size: int, dp: int = 1) -> int:
    """Return the streams to read: batch_size, fewer of fewer documents, a multiple of dp."""
    return max(1, min(documents, batch_size) // dp) * dp


def count_steps(streams: Streams, tokens: int | None) -> int:
    """Return the steps, of one sample of each lane, that read about `tokens` tokens."""
    if tokens is None:
        return streams.steps_per_epoch
    per_step = streams.lanes * streams.segments * streams.segment_len
    return min(max(1, round(tokens / per_step)), streams.steps_per_epoch)


class _Tally:
    """Adds up losses by position and by document, on the CPU, in float64."""

    def __init__(self, streams: Streams, steps: int, places: NDArray[np.int64]) -> None:
        self.lanes, self.segment_len = streams.lanes, streams.segment_len
        self.places = places  # of this rank's tokens in their segment
        self.edges = bucket_edges(streams.segment_len, int(streams.lengths.max()))
        self.buckets = np.zeros((2, len(self.edges) - 1))  # losses, tokens
        # Of each lane, its documents in order: no more of them than segments.
        self.passages = np.zeros((2, self.lanes, steps * streams.segments))
        self.passage = np.full(self.lanes, -1)
        self.begin = np.zeros(self.lanes, dtype=np.int64)

    def add(self, batch: Batch, labels: Tensor, token_losses: Tensor) -> None:
        """Add a batch: labels (CPU) and losses [B, N, S / cp] of this rank's tokens."""
        first = batch.first_position % self.lanes
        lanes = np.arange(first, first + len(batch.starts))
        starts, offsets = batch.starts.numpy(), batch.offsets.numpy()
        wanted = (labels != IGNORE).numpy()
        losses = np.where(wanted, token_losses.double().cpu().numpy(), 0.0)
        for n in range(starts.shape[1]):
            self.passage[lanes] += starts[:, n]
            self.begin[lanes] = np.where(starts[:, n], offsets[:, n], self.begin[lanes])
            read = offsets[:, n] - self.begin[lanes]  # before this segment
            self._add_positions(read, losses[:, n], wanted[:, n])
            late = read >= self.segment_len
            for row, part in ((0, losses), (1, wanted)):
                self.passages[row, lanes, self.passage[lanes]] += part[:, n].sum(-1) * late

    def _add_positions(
        self, read: NDArray[np.int64], losses: NDArray[np.float64], wanted: NDArray[np.bool_]
    ) -> None:
        positions = (read[:, None] + self.places)[wanted]
        bucket = np.searchsorted(self.edges, positions, side="right") - 1
        length = self.buckets.shape[1]
        self.buckets[0] += np.bincount(bucket, weights=losses[wanted], minlength=length)
        self.buckets[1] += np.bincount(bucket, minlength=length)

    def result(self, memory: bool, mesh: Mesh | None) -> PositionLosses:
        """Return the sums over all ranks: DP ranks have different lanes, CP ranks tokens."""
        flat = np.concatenate([self.buckets.ravel(), self.passages.ravel()])
        if mesh is not None:
            total = torch.from_numpy(flat).to(mesh.device)
            dist.all_reduce(total, group=mesh.zero_group)
            flat = total.cpu().numpy()
        sums, counts = flat[: self.buckets.size].reshape(2, -1)
        losses, tokens = flat[self.buckets.size :].reshape(2, -1)
        used = int(counts.nonzero()[0].max(initial=-1)) + 1
        kept = tokens > 0
        return PositionLosses(
            memory=memory,
            segment_len=self.segment_len,
            edges=self.edges[: used + 1],
            sums=tuple(sums[:used].tolist()),
            counts=tuple(counts[:used].astype(int).tolist()),
            passages=tuple(
                (float(loss), int(count))
                for loss, count in zip(losses[kept], tokens[kept], strict=True)
            ),
        )


def _largest_divisor(number: int, limit: int) -> int:
    return max(n for n in range(1, max(1, min(number, limit)) + 1) if number % n == 0)


def _shown(batches: Iterator[list[Batch]], steps: int, progress: bool) -> Iterator[list[Batch]]:
    """Return the batches, counted by a bar on a terminal."""
    from tqdm import tqdm

    # disable=None: no bar where stderr is a file
    disable = None if progress else True
    return iter(tqdm(batches, "evaluate", steps, leave=False, unit="step", disable=disable))


def run(
    checkpoint: Path,
    data: Path | None = None,
    memory: bool = True,
    tokens: int | None = None,
    output: Path | None = None,
) -> int:
    """Evaluate a checkpoint on this one process, print a table and return 0.

    checkpoint: one checkpoint's folder, or a run's for its newest good one. data: prepared
    shards (None: the run's data.valid). memory: with it and without, for the difference; False:
    only without. tokens: about as many (None: all). output: a JSON file to write, with a
    picture beside it.

    Raises ValueError for everything that the user can mend.
    """
    from train.snapshot import read_model

    model, config = read_model(checkpoint)
    corpus = _open_corpus(model, config, data)
    carries = config.model.memory.name != "none"
    wanted = [True] * memory + [False] * (carries or not memory)
    results = {on: _measure(model, config, corpus, tokens, on) for on in wanted}
    on, off = results.get(True), results.get(False)
    print(f"{checkpoint} on {corpus.folder}\n\n{table(on, off)}\n")
    if on and off:
        print(f"memory's gain: {describe_gain(on, off)}")
    elif on:
        print("this model has no memory: every segment is read by itself")
    for damage in corpus.damage:
        print(f"left out: {damage}")
    if output is not None:
        _write(output, checkpoint, corpus, on, off)
    return 0


def _open_corpus(model: Decoder, config: Config, data: Path | None) -> Corpus:
    folder = data or config.data.valid
    if folder is None:
        raise ValueError("the run has no data.valid; name prepared shards with --data FOLDER")
    corpus = Corpus.open(folder, on_damage=config.data.on_damage)
    if corpus.manifest.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder} has tokens up to {corpus.manifest.vocab_size - 1}, the model's"
            f" vocab_size is {model.config.vocab_size}; prepare it with the run's tokenizer"
        )
    return corpus


def _measure(
    model: Decoder, config: Config, corpus: Corpus, tokens: int | None, memory: bool
) -> PositionLosses:
    def forward(
        tokens: Tensor,
        starts: Tensor,
        state: list[State] | None,
        labels: Tensor,
        scale: Tensor,
    ) -> Output:
        result: Output = model(tokens, starts, state, labels=labels, scale=scale)
        return result

    return evaluate(
        forward,
        corpus,
        segment_len=config.data.segment_len,
        segments=config.num_segments,
        lanes=choose_lanes(len(corpus.lengths), config.train.batch_size),
        tokens=tokens,
        memory=memory,
        micro_batch=config.train.micro_batch,
        device=next(model.parameters()).device,
        workers=config.data.workers,
        progress=True,
    )


def _write(
    output: Path,
    checkpoint: Path,
    corpus: Corpus,
    on: PositionLosses | None,
    off: PositionLosses | None,
) -> None:
    from train.picture import plot_evaluation
    from train.positions import gain

    found = gain(on, off) if on and off else None
    values = {
        "checkpoint": str(checkpoint),
        "data": str(corpus.folder),
        "fingerprint": corpus.fingerprint,
        "evaluations": [losses.to_json() for losses in (on, off) if losses],
        "gain": found._asdict() if found else None,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(values, indent=1) + "\n")
    picture = plot_evaluation(output.with_suffix(".png"), on, off, title=str(checkpoint))
    print(f"written: {output}, {picture}")
