"""HOMER: hierarchical context merging, a training-free way to read a prompt longer than a segment.

The context is cut into chunks, each read between the same prefix and suffix at the same positions.
Chunks meet in a binary tree while they climb through the layers: in the last layer of every node
the context tokens that the final token attends to least are dropped, from the keys of all layers
below too, and two neighbours go on as one. What is left after the last layer is a short cache of
every layer, from which decoding continues. (Song et al. 2024, arXiv 2404.10308.)

For models with `memory: none`: inference, one device, one prompt. It reads far, but not well: its
perplexity is worse than that of the last tokens alone. Show it beside `truncated`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.compact import Compact, Rows, attend, compact_of, embed, project, turns_of
from model.config import NoMemory
from model.decoder import Decoder
from model.precision import sum_dtype


class Plan(NamedTuple):
    """A tree of chunks. Levels are counted from the leaves; the last one is the root."""

    leaves: list[int]  # context tokens of each chunk, left to right
    layers: list[range]  # which layers each level's nodes run
    keep: list[int]  # context tokens that each level's nodes keep at most


def plan_merge(
    context_len: int,
    affix_len: int,
    *,
    chunk_len: int,
    target_len: int,
    num_layers: int,
    warmup_layers: int,
) -> Plan:
    """Return the tree for a context of context_len tokens; affix_len: of prefix and suffix.

    The fewest chunks, a power of two, that hold the context evenly in chunk_len tokens each; the
    layers above the warm-up in equal shares for the levels, what is left over to the leaves.
    Raises ValueError for lengths or layers that allow no tree.
    """
    room = chunk_len - affix_len
    if room < 2:
        raise ValueError(
            f"chunk_len={chunk_len} leaves {max(room, 0)} tokens of context beside prefix and"
            f" suffix ({affix_len}); use at least {affix_len + 2}, or shorter affixes"
        )
    if not affix_len < target_len <= chunk_len:
        raise ValueError(
            f"target_len={target_len} is not in {affix_len + 1}..{chunk_len}: it holds prefix and"
            " suffix and one token of context, and never more than chunk_len"
        )
    if not 0 <= warmup_layers < num_layers:
        raise ValueError(f"warmup_layers={warmup_layers} is not in 0..{num_layers - 1}")
    height = (max(-(-context_len // room), 1) - 1).bit_length()
    layers = num_layers - warmup_layers
    if layers < height + 1:
        raise ValueError(
            f"a context of {context_len} tokens needs {2**height} chunks of {room}, merged over"
            f" {height + 1} levels, but {layers} layers lie above warmup_layers={warmup_layers};"
            f" use at most {room * 2 ** (layers - 1)} tokens of context, a longer chunk_len or"
            " fewer warm-up layers"
        )
    share = layers // (height + 1)
    ends = [num_layers - share * above for above in range(height, -1, -1)]
    short, longer = divmod(context_len, 2**height)
    return Plan(
        [short + (i < longer) for i in range(2**height)],
        [range(*pair) for pair in zip([0, *ends[:-1]], ends, strict=True)],
        [room // 2] * height + [target_len - affix_len],
    )


@torch.no_grad()
def merge_context(
    model: Decoder,
    prefix: Tensor,
    context: Tensor,
    suffix: Tensor,
    *,
    chunk_len: int,
    target_len: int,
    warmup_layers: int,
    segment_len: int,
    bias: Tensor | None = None,
) -> Compact:
    """Return the prompt prefix + context + suffix read by merging, at most target_len tokens of it.

    prefix, context, suffix: int64 [any length], only the suffix at least 1: its last token chooses
    what is kept. chunk_len: tokens of a chunk with its affixes; target_len: tokens kept in the end;
    warmup_layers: the lowest layers, run before anything is pruned. segment_len: what the model
    was trained on, which bounds chunk_len and the positions that decoding continues to. bias
    [layers, distances] of `calibrate`, taken from the scores (None: zeros). Holds the tensors of
    log2(chunks) + 2 chunks at most. With one chunk and target_len its length this is the plain
    forward pass. Raises ValueError where the model, the lengths or the bias do not allow it.
    """
    _check(model, chunk_len, segment_len)
    if not suffix.numel():
        raise ValueError(
            "the suffix is empty, but its last token chooses what is kept of the context; move the"
            " last tokens of the prompt (the question) into it"
        )
    plan = plan_merge(
        len(context),
        len(prefix) + len(suffix),
        chunk_len=chunk_len,
        target_len=target_len,
        num_layers=model.config.num_layers,
        warmup_layers=warmup_layers,
    )
    longest = len(prefix) + len(suffix) + max(plan.leaves)
    if bias is not None and (len(bias) != len(model.blocks) or bias.shape[1] < longest):
        raise ValueError(
            f"bias is {list(bias.shape)}, but {len(model.blocks)} layers and distances up to"
            f" {longest - 1} are read: calibrate this model on texts of {chunk_len} tokens"
        )
    merging = _Merging(model, len(prefix), len(suffix), plan, bias)
    pending: list[tuple[int, Rows]] = []  # finished nodes that wait for their right neighbour
    for chunk in _leaves(model, prefix, context, suffix, plan):
        level, node = 0, merging.climb(chunk, 0)
        del chunk
        while pending and pending[-1][0] == level:
            level, node = level + 1, merging.join(pending.pop()[1], node)
            node = merging.climb(node, level)
        pending.append((level, node))
    return compact_of(model, pending.pop()[1], segment_len)


@torch.no_grad()
def truncated(
    model: Decoder,
    prefix: Tensor,
    context: Tensor,
    suffix: Tensor,
    *,
    chunk_len: int,
    segment_len: int,
) -> Compact:
    """Return the prompt without the first tokens of the context, so that chunk_len holds the rest.

    The plain baseline of `merge_context`, with the same arguments; all parts but one may be empty.
    """
    _check(model, chunk_len, segment_len)
    room = chunk_len - len(prefix) - len(suffix)
    if room < 0:
        raise ValueError(
            f"chunk_len={chunk_len} does not hold prefix and suffix"
            f" ({len(prefix) + len(suffix)} tokens); use more, or shorter affixes"
        )
    tokens = torch.cat((prefix, context[max(len(context) - room, 0) :], suffix))
    if not len(tokens):
        raise ValueError("the prompt is empty; give at least one token")
    plan = Plan([0], [range(model.config.num_layers)], [len(tokens)])
    chunk = Rows(embed(model, tokens), torch.arange(len(tokens)), [], [])
    whole = _Merging(model, 0, 0, plan, None).climb(chunk, 0)
    return compact_of(model, whole, segment_len)


@torch.no_grad()
def calibrate(model: Decoder, texts: Iterable[Tensor]) -> Tensor:
    """Return the mean score of a key at each distance: bias [layers, longest text], float32.

    texts: int64 [at most segment_len], some tens of them; `merge_context` needs one distance for
    each token of its chunks. The mean is over every query of every text.
    """
    held = list(texts)
    if not held:
        raise ValueError("no texts to calibrate on; give some tens, of chunk_len tokens each")
    device = next(model.parameters()).device
    longest = max(len(tokens) for tokens in held)
    sums = torch.zeros(len(model.blocks), longest, dtype=torch.float64, device=device)
    counts = torch.zeros_like(sums[0])
    for tokens in held:
        x, positions = embed(model, tokens), torch.arange(len(tokens))
        turns = turns_of(model, positions, x)
        counts[: len(tokens)] += torch.arange(len(tokens), 0, -1, device=device)
        for i, block in enumerate(model.layers()):
            q, k, v = project(block, x, turns)
            _add_by_distance(sums[i], q, k)
            x = block.finish(x, attend(q, k, v, causal=True))
    return (sums / counts).float()


def _add_by_distance(sums: Tensor, q: Tensor, k: Tensor) -> None:
    """Add to sums [distances] the scores of all queries q for the keys k up to them."""
    places = torch.arange(len(k), device=k.device)
    for rows in places.split(256):
        distance = rows.unsqueeze(1) - places
        seen = distance >= 0
        sums.index_add_(0, distance[seen], _scores(q[rows], k)[seen].to(sums))


def _leaves(
    model: Decoder, prefix: Tensor, context: Tensor, suffix: Tensor, plan: Plan
) -> Iterator[Rows]:
    """Yield the chunks from left to right, embedded; the suffix lies where the longest one ends."""
    first, last = 0, len(prefix) + max(plan.leaves)
    for length in plan.leaves:
        tokens = torch.cat((prefix, context[first : first + length], suffix))
        positions = torch.cat(
            (torch.arange(len(prefix) + length), torch.arange(last, last + len(suffix)))
        )
        yield Rows(embed(model, tokens), positions, [], [])
        first += length


class _Merging:
    """What every node of one tree shares."""

    def __init__(
        self, model: Decoder, prefix_len: int, suffix_len: int, plan: Plan, bias: Tensor | None
    ) -> None:
        self.model, self.blocks, self.plan, self.bias = model, model.layers(), plan, bias
        self.prefix_len, self.suffix_len = prefix_len, suffix_len

    def climb(self, chunk: Rows, level: int) -> Rows:
        """Return the chunk after the layers of its level, pruned in the last of them.

        Later tokens of the chunk read earlier ones, whatever their positions.
        """
        x, positions, keys, values = chunk.hidden, chunk.positions, chunk.keys, chunk.values
        layers, turns = self.plan.layers[level], turns_of(self.model, positions, x)
        for i in layers:
            q, k, v = project(self.blocks[i], x, turns)
            attended = attend(q, k, v, causal=True)
            # v is a part of what project made of x: its copy lets the rest go.
            keys, values = [*keys, k], [*values, v.contiguous()]
            if i == layers[-1]:
                kept = self.choose(i, q[-1], k, positions, self.plan.keep[level])
                if len(kept) < len(x):
                    x, attended, positions = x[kept], attended[kept], positions[kept.cpu()]
                    keys, values = [each[kept] for each in keys], [each[kept] for each in values]
            x = self.blocks[i].finish(x, attended)
        return Rows(x, positions, keys, values)

    def choose(self, layer: int, query: Tensor, k: Tensor, positions: Tensor, keep: int) -> Tensor:
        """Return the rows to keep, rising: the affixes and the `keep` best of the context.

        query [H, K] of the final token, k [T, Hkv, K]: their scores, less the bias of the distance.
        """
        rows = torch.arange(len(k), device=k.device)
        end = len(k) - self.suffix_len
        if end - self.prefix_len <= keep:
            return rows
        scores = _scores(query, k)
        if self.bias is not None:
            scores = scores - self.bias[layer, positions[-1] - positions].to(scores)
        best = scores[self.prefix_len : end].topk(keep).indices.sort().values
        return torch.cat((rows[: self.prefix_len], best + self.prefix_len, rows[end:]))

    def join(self, left: Rows, right: Rows) -> Rows:
        """Return one chunk of two neighbours: contexts one after the other, affixes averaged."""

        def both(a: Tensor, b: Tensor) -> Tensor:
            p, end_a, end_b = self.prefix_len, len(a) - self.suffix_len, len(b) - self.suffix_len
            # Positions are the same in both, so integers stay what they are.
            prefix, suffix = ((a[:p] + b[:p]) / 2).to(a), ((a[end_a:] + b[end_b:]) / 2).to(a)
            return torch.cat((prefix, a[p:end_a], b[p:end_b], suffix))

        return Rows(
            both(left.hidden, right.hidden),
            both(left.positions, right.positions),
            [both(*pair) for pair in zip(left.keys, right.keys, strict=True)],
            [both(*pair) for pair in zip(left.values, right.values, strict=True)],
        )


def _check(model: Decoder, chunk_len: int, segment_len: int) -> None:
    if not isinstance(model.config.memory, NoMemory):
        raise ValueError(
            f"model.memory={model.config.memory.name} reads a long prompt by itself, segment by"
            " segment; merging and truncating are for memory: none"
        )
    if model.sequence.size > 1 or model.linears.size > 1:
        raise ValueError(
            f"cp={model.sequence.size} and tp={model.linears.size}, but merging runs on one device;"
            " load the checkpoint with both 1"
        )
    if chunk_len > segment_len:
        raise ValueError(
            f"chunk_len={chunk_len} is above segment_len={segment_len}, the positions the model was"
            f" trained on; use at most {segment_len} less the tokens to generate"
        )


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return the attention logits, their maximum over heads: [..., T] float32 or wider.

    q [..., H, K], k [T, Hkv, K], both rotated.
    """
    wide = sum_dtype(q)
    grouped = q.to(wide).unflatten(-2, (k.shape[1], -1))
    logits = torch.einsum("...hgd,thd->...thg", grouped, k.to(wide))
    highest: Tensor = logits.amax((-2, -1))
    return highest / math.sqrt(q.shape[-1])
