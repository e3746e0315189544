"""Whether a model answers from its memory: questions asked with it, without, and with another's.

A prompt is read segment by segment; then its last segment, which ends with question and answer,
is read three times: with the state that the document left (on), with none (off), and with the
state that another prompt of the same length left (shuffled). The last is what tells a memory
that is used from one that is merely expected to be there. No answer is ever read into a state
that is used again.

    [pad .. document ..] [.. document ..] [.. document, question, answer]

Alignment: the longest answer ends the last segment, the question always just before it (shorter
answers are followed by end-of-document tokens that nothing reads); what is missing to whole
segments, a word where the prompt was made for a multiple of S, is end-of-document tokens before
the document.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.streams import IGNORE
from data.tasks import Prompt, Unfit
from data.tokenizer import Tokenizer
from model.decoder import Decoder
from model.memory.base import State, map_tensors
from train.evaluation.donors import bytes_per_stream

Int64Array = NDArray[np.int64]

PrepareBatch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""prepare(tokens, labels) [B, 1, S] int64 -> the same as the model wants them, [B, 1, S'].

For memories that read tokens of their own, such as landmarks; labels (IGNORE but at the answer)
are moved along.
"""


class Reader(Protocol):
    """A model that reads one segment of B streams at a time; tokens [B, 1, S]."""

    def read(self, tokens: Tensor, state: State | None) -> State:
        """Return the state after a segment (state None: of streams that begin)."""
        ...

    def logits(self, tokens: Tensor, state: State | None, wanted: Tensor) -> Tensor:
        """Return the logits [W, V] of the W places of wanted [B, 1, S] bool, row by row.

        The state after the segment is dropped.
        """
        ...


class DecoderReader:
    """A whole decoder on one process."""

    def __init__(self, model: Decoder, step: int | None = None) -> None:
        """step: of training, for memories that train in stages (None: the last one)."""
        self.model, self.step = model, step
        self.device = next(model.parameters()).device

    def read(self, tokens: Tensor, state: State | None) -> State:
        """Return the state after a segment."""
        return self._run(tokens, state, torch.zeros_like(tokens, dtype=torch.bool))[1]

    def logits(self, tokens: Tensor, state: State | None, wanted: Tensor) -> Tensor:
        """Return the logits [W, V] of the places wanted, in float32 on the CPU."""
        return self._run(tokens, state, wanted)[0].float().cpu()

    def _run(self, tokens: Tensor, state: State | None, wanted: Tensor) -> tuple[Tensor, State]:
        tokens, wanted = tokens.to(self.device), wanted.to(self.device)
        starts = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=self.device)
        found: tuple[Tensor, State] = self.model(
            tokens, starts, state, wanted=wanted, step=self.step
        )
        return found


class Metered:
    """A reader, and what it costs."""

    def __init__(self, reader: Reader, segment_len: int) -> None:
        """segment_len: text tokens of a segment."""
        self.reader, self.segment_len = reader, segment_len
        self.calls, self.tokens, self.seconds = 0, 0, 0.0
        self.state_bytes = 0  # the most that one stream carried on this rank

    @property
    def tokens_per_s(self) -> float:
        """Tokens of text a second, nan where nothing was measured."""
        return self.tokens / self.seconds if self.seconds else math.nan

    def read(self, tokens: Tensor, state: State | None) -> State:
        """Return the state after a segment."""
        began = time.perf_counter()
        after = self.reader.read(tokens, state)
        self._count(len(tokens), began)
        self.state_bytes = max(self.state_bytes, bytes_per_stream(after))
        return after

    def logits(self, tokens: Tensor, state: State | None, wanted: Tensor) -> Tensor:
        """Return the logits of the places wanted."""
        began = time.perf_counter()
        found = self.reader.logits(tokens, state, wanted)  # waits for a GPU, and for what it read
        self._count(len(tokens), began)
        return found

    def _count(self, streams: int, began: float) -> None:
        self.calls += 1
        if self.calls > 1:  # the first call allocates, and may compile
            self.seconds += time.perf_counter() - began
            self.tokens += streams * self.segment_len


class Answered(NamedTuple):
    """One question: right or wrong in the three conditions."""

    on: bool
    off: bool
    shuffled: bool
    far: bool  # a fact that it needs begins before the segment of the question


class _Row(NamedTuple):
    """A prompt as tokens: N segments, the candidates' tokens to come at `answer_at` of the last."""

    tokens: Int64Array  # [N, S], end_of_document where the answer will be
    candidates: list[Int64Array]
    answer_at: int
    right: int  # which candidate
    exact: bool
    far: bool


@torch.no_grad()
def measure(
    reader: Reader,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    segment_len: int,
    batch: int = 8,
    prepare_batch: PrepareBatch | None = None,
) -> list[Answered]:
    """Return the answers to all prompts, in their order.

    segment_len: S, text tokens a segment (without those that prepare_batch adds). A prompt with
    choices is right if its answer has the greatest log-probability of them (of the whole text,
    not per token), one without if each of its answer's tokens is the likeliest after those
    before it: what greedy decoding gives.

    Raises Unfit for a question longer than a segment, ValueError for a prompt that is the only
    one of its number of segments: there is no other state to shuffle in.
    """
    rows = [lay_out(prompt, tokenizer, segment_len) for prompt in prompts]
    results: dict[int, Answered] = {}
    for numbers in _groups([len(row.tokens) for row in rows], batch):
        group = [rows[i] for i in numbers]
        stacked = torch.from_numpy(np.stack([row.tokens for row in group]))
        state = _read(reader, stacked, prepare_batch)
        right = [
            _judge(reader, group, condition, prepare_batch) for condition in _conditions(state)
        ]
        for i, row, on, off, shuffled in zip(numbers, group, *right, strict=True):
            results[i] = Answered(on, off, shuffled, row.far)
    return [results[i] for i in range(len(rows))]


def lay_out(prompt: Prompt, tokenizer: Tokenizer, segment_len: int) -> _Row:
    """Return a prompt's tokens in whole segments; see the alignment above."""
    document, question = tokenizer.encode(prompt.document), tokenizer.encode(prompt.question)
    candidates = [tokenizer.encode(text).astype(np.int64) for text in prompt.candidates]
    room = max(map(len, candidates))
    if len(question) + room > segment_len:
        raise Unfit(
            f"question and answer of {prompt.task} take {len(question) + room} tokens,"
            f" segment_len is {segment_len}: they must fit into one segment; leave"
            f" {prompt.task} out"
        )
    total = len(document) + len(question) + room
    # Prompts of one length all have equally many segments, however well their text fits.
    count = -(-max(total, prompt.length) // segment_len)
    before = count * segment_len - total
    tokens = np.full(count * segment_len, tokenizer.end_of_document, dtype=np.int64)
    tokens[before : len(tokens) - room] = np.concatenate([document, question])
    last = (count - 1) * segment_len
    far = count > 1 and (not prompt.gold or before + min(prompt.gold) < last)
    return _Row(
        tokens.reshape(count, segment_len),
        candidates,
        segment_len - room,
        prompt.candidates.index(prompt.answer),
        prompt.choices is None,
        far,
    )


def _groups(segments: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Yield prompts of equal numbers of segments, 2 to about `batch` together."""
    alike = defaultdict(list)
    for number, count in enumerate(segments):
        alike[count].append(number)
    for count, numbers in alike.items():
        if count > 1 and len(numbers) == 1:
            raise ValueError(
                f"one prompt alone has {count} segments: another's memory is needed to compare"
                f" with; use at least 2 prompts of each length"
            )
        parts = max(1, min(-(-len(numbers) // max(2, batch)), len(numbers) // 2))
        yield from (part.tolist() for part in np.array_split(numbers, parts))


def _read(reader: Reader, tokens: Tensor, prepare: PrepareBatch | None) -> State | None:
    """Return the state before the last segment of tokens [B, N, S]; None where that is all."""
    state = None
    for n in range(tokens.shape[1] - 1):
        segment = tokens[:, n : n + 1]
        if prepare is not None:
            segment, _ = prepare(segment, torch.full_like(segment, IGNORE))
        state = reader.read(segment, state)
    return state


def _conditions(state: State | None) -> tuple[State | None, State | None, State | None]:
    if state is None:
        return None, None, None
    # Each row takes the state of the row before it.
    return state, None, map_tensors(lambda tensor: tensor.roll(1, 0), state)


def _judge(
    reader: Reader, rows: Sequence[_Row], state: State | None, prepare: PrepareBatch | None
) -> list[bool]:
    """Return for each row whether its answer is right, given the state before the last segment."""
    scores = np.full((len(rows), max(len(row.candidates) for row in rows)), -np.inf)
    exact = [False] * len(rows)
    for choice in range(scores.shape[1]):
        tokens = torch.from_numpy(np.stack([row.tokens[-1:] for row in rows]))
        labels = torch.full_like(tokens, IGNORE)
        asked = [i for i, row in enumerate(rows) if choice < len(row.candidates)]
        for i in asked:
            answer = torch.from_numpy(rows[i].candidates[choice])
            begin = rows[i].answer_at
            tokens[i, 0, begin : begin + len(answer)] = answer
            labels[i, 0, begin - 1 : begin - 1 + len(answer)] = answer
        likeliest, logp = _score(reader, tokens, labels, state, prepare)
        for i in asked:
            scores[i, choice] = logp[i]
            exact[i] = bool(likeliest[i])
    best = scores.argmax(1)
    return [exact[i] if row.exact else bool(best[i] == row.right) for i, row in enumerate(rows)]


def _score(
    reader: Reader,
    tokens: Tensor,
    labels: Tensor,
    state: State | None,
    prepare: PrepareBatch | None,
) -> tuple[Tensor, Tensor]:
    """Return for tokens, labels [B, 1, S]: all labelled tokens are the likeliest, their log p."""
    if prepare is not None:
        tokens, labels = prepare(tokens, labels)
    wanted = labels != IGNORE
    target, rows = labels[wanted], wanted.flatten(1).sum(1).tolist()
    logits = reader.logits(tokens, state, wanted)
    hits = (logits.argmax(-1) == target).split(rows)
    logp = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).split(rows)
    return torch.stack([hit.all() for hit in hits]), torch.stack([part.sum() for part in logp])
