"""Hierarchical context merging: against the plain forward pass, and against a slow twin."""

import math
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import model.homer
from model.compact import Compact, Rows, continue_from
from model.config import MemoryConfig, NoMemory, WindowMemory
from model.decoder import Decoder
from model.homer import Plan, calibrate, merge_context, plan_merge, truncated
from model.rope import rope_tables, rotate
from tests.compare import relative
from tests.model.dense import attend
from tests.model.small import VOCAB, build, config_of

SEGMENT_LEN = 64
LAYERS = 7


def model_of(
    memory: MemoryConfig | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    layers: int = LAYERS,
    tied: bool = False,
) -> Decoder:
    config = config_of(memory or NoMemory(), num_layers=layers, tie_embeddings=tied)
    return build(config, dtype)


def some(count: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


class Prompt(NamedTuple):
    prefix: Tensor
    context: Tensor
    suffix: Tensor


def prompt_of(context_len: int, prefix_len: int = 3, suffix_len: int = 2) -> Prompt:
    return Prompt(some(prefix_len, 1), some(context_len, 2), some(suffix_len, 3))


def read(decoder: Decoder, prompt: Prompt, **changes: object) -> Compact:
    how = {"chunk_len": 15, "target_len": 13, "warmup_layers": 2, "segment_len": SEGMENT_LEN}
    return merge_context(decoder, *prompt, **(how | changes))


def plain(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits [T, V] of the decoder's own forward pass over one segment."""
    logits, _ = decoder(tokens.view(1, 1, -1), torch.ones(1, 1, dtype=torch.bool))
    return logits[0, 0].detach()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lengths", [(3, 20, 2), (0, 20, 1), (4, 0, 3), (0, 0, 5)])
def test_one_chunk_is_the_plain_forward_pass(lengths: tuple[int, int, int], tied: bool) -> None:
    decoder, prompt = model_of(tied=tied), prompt_of(lengths[1], lengths[0], lengths[2])
    tokens = torch.cat(prompt)
    compact = read(decoder, prompt, chunk_len=40, target_len=40)
    assert compact.positions[: compact.num_tokens].tolist() == list(range(len(tokens)))
    assert relative(compact.logits, plain(decoder, tokens)[-1]) < 1e-10
    for token in (7, 0, 31):
        tokens = torch.cat((tokens, torch.tensor([token])))
        assert relative(continue_from(compact, token), plain(decoder, tokens)[-1]) < 1e-10
    tied_to = decoder.embedding.weight if tied else None
    from_hidden = decoder.head(compact.hidden.unsqueeze(0), None, None, tied_to)[0]
    assert torch.equal(from_hidden, compact.logits)


def test_truncation_reads_the_last_tokens_that_fit() -> None:
    decoder, prompt = model_of(), prompt_of(100)
    compact = truncated(decoder, *prompt, chunk_len=30, segment_len=SEGMENT_LEN)
    tokens = torch.cat((prompt.prefix, prompt.context[-25:], prompt.suffix))
    assert relative(compact.logits, plain(decoder, tokens)[-1]) < 1e-10
    tokens = torch.cat((tokens, torch.tensor([7])))
    assert relative(continue_from(compact, 7), plain(decoder, tokens)[-1]) < 1e-10


@pytest.mark.parametrize("empty", ["prefix", "context", "suffix"])
def test_truncation_takes_a_prompt_with_an_empty_part(empty: str) -> None:
    decoder, prompt = model_of(), prompt_of(4)._replace(**{empty: some(0, 0)})
    compact = truncated(decoder, *prompt, chunk_len=10, segment_len=SEGMENT_LEN)
    assert relative(compact.logits, plain(decoder, torch.cat(prompt))[-1]) < 1e-10


class TwinNode(NamedTuple):
    """What the twin knows of a node: keys are not rotated, affixes stay apart."""

    parts: tuple[Tensor, Tensor, Tensor]  # hidden of prefix, context, suffix
    places: tuple[Tensor, Tensor, Tensor]
    keys: list[tuple[Tensor, Tensor, Tensor]]
    values: list[tuple[Tensor, Tensor, Tensor]]


class Twin:
    """The algorithm by recursion, with full masks, one head's scores at a time."""

    def __init__(self, decoder: Decoder, prompt: Prompt, plan: Plan, bias: Tensor | None) -> None:
        self.decoder, self.prompt, self.plan, self.bias = decoder, prompt, plan, bias
        self.lengths: list[int] = []

    def node(self, level: int, index: int) -> TwinNode:
        if level == 0:
            first = sum(self.plan.leaves[:index])
            prefix, context, suffix = self.prompt
            context = context[first : first + self.plan.leaves[index]]
            start = len(prefix) + max(self.plan.leaves)
            places = (
                torch.arange(len(prefix)),
                len(prefix) + torch.arange(len(context)),
                start + torch.arange(len(suffix)),
            )
            parts = tuple(self.decoder.embed(part) for part in (prefix, context, suffix))
            return self.run(TwinNode(parts, places, [], []), 0)
        left, right = self.node(level - 1, 2 * index), self.node(level - 1, 2 * index + 1)

        def join(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (a[0] + b[0]) / 2, torch.cat((a[1], b[1])), (a[2] + b[2]) / 2

        context = torch.cat((left.places[1], right.places[1]))
        joined = TwinNode(
            join(left.parts, right.parts),
            (left.places[0], context, left.places[2]),
            [join(*pair) for pair in zip(left.keys, right.keys, strict=True)],
            [join(*pair) for pair in zip(left.values, right.values, strict=True)],
        )
        return self.run(joined, level)

    def run(self, node: TwinNode, level: int) -> TwinNode:
        sizes = [len(part) for part in node.parts]
        self.lengths.append(sum(sizes))
        x, places = torch.cat(node.parts), torch.cat(node.places)
        keys, values = list(node.keys), list(node.values)
        kept = list(range(sum(sizes)))
        for i in self.plan.layers[level]:
            block = self.decoder.layers()[i]
            q, k, v, _ = block.project(x)
            turned_q, turned_k = self.turn(q, places), self.turn(k, places)
            mask = torch.ones(len(x), len(x)).tril().bool()
            attended, _ = attend(turned_q, turned_k, v, mask)
            keys.append(k.split(sizes))
            values.append(v.split(sizes))
            if i == self.plan.layers[level][-1]:
                kept = self.choose(i, turned_q[-1], turned_k, places, sizes, self.plan.keep[level])
                x, attended = x[kept], attended[kept]
            x = block.finish(x, attended)
        inside = [row - sizes[0] for row in kept[sizes[0] : len(kept) - sizes[2]]]

        def drop(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return parts[0], parts[1][inside], parts[2]

        return TwinNode(
            x.split([sizes[0], len(inside), sizes[2]]),
            drop(node.places),
            [drop(parts) for parts in keys],
            [drop(parts) for parts in values],
        )

    def turn(self, x: Tensor, places: Tensor) -> Tensor:
        config = self.decoder.config
        cos, sin = rope_tables(places, config.head_dim, config.rope_base, x)
        return rotate(x, cos.unsqueeze(1), sin.unsqueeze(1))

    def choose(
        self, layer: int, q: Tensor, k: Tensor, places: Tensor, sizes: list[int], keep: int
    ) -> list[int]:
        group = q.shape[0] // k.shape[1]
        ranked = []
        for row in range(sizes[0], sizes[0] + sizes[1]):
            score = max(float(q[h] @ k[row, h // group]) for h in range(q.shape[0]))
            score /= math.sqrt(q.shape[1])
            if self.bias is not None:
                score -= float(self.bias[layer, int(places[-1] - places[row])])
            ranked.append((score, row))
        best = sorted(row for _, row in sorted(ranked, reverse=True)[:keep])
        return [*range(sizes[0]), *best, *range(sizes[0] + sizes[1], sum(sizes))]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("context_len", [10, 17, 37, 80])
def test_merging_equals_the_slow_twin(context_len: int, with_bias: bool) -> None:
    decoder, prompt = model_of(), prompt_of(context_len)
    bias = 3 * torch.randn(LAYERS, 15, generator=torch.Generator().manual_seed(4))
    given = bias if with_bias else None
    compact = read(decoder, prompt, bias=given)
    plan = plan_merge(
        context_len, 5, chunk_len=15, target_len=13, num_layers=LAYERS, warmup_layers=2
    )
    twin = Twin(decoder, prompt, plan, given)
    with torch.no_grad():
        root = twin.node(len(plan.layers) - 1, 0)
    places, count = torch.cat(root.places), compact.num_tokens
    assert compact.positions[:count].tolist() == places.tolist()
    for i in range(LAYERS):
        keys, values = twin.turn(torch.cat(root.keys[i]), places), torch.cat(root.values[i])
        assert relative(compact.keys[i, :count], keys) < 1e-12
        assert relative(compact.values[i, :count], values) < 1e-12
    assert relative(compact.hidden, root.parts[2][-1]) < 1e-12
    assert max(twin.lengths) <= 15


def test_a_bias_changes_what_is_kept() -> None:
    decoder, prompt = model_of(), prompt_of(37)
    bias = torch.zeros(LAYERS, 15)
    bias[:, 2:8] = 100.0  # nothing of the nearest distances
    positions = [read(decoder, prompt, bias=given).positions for given in (None, bias)]
    assert not torch.equal(*positions)


def test_decoding_equals_reading_all_new_tokens_at_once_over_the_cache() -> None:
    decoder = model_of()
    compact = read(decoder, prompt_of(37))
    count, position = compact.num_tokens, compact.next_position
    keys, values = compact.keys[:, :count].clone(), compact.values[:, :count].clone()
    new = some(6, 5)
    logits = torch.stack([continue_from(compact, int(token)) for token in new])
    places = position + torch.arange(6)
    assert compact.num_tokens == count + 6
    assert compact.positions[count : count + 6].tolist() == places.tolist()
    x = decoder.embed(new)
    mask = torch.ones(6, count + 6).tril(count).bool()
    config = decoder.config
    cos, sin = (
        part.unsqueeze(1) for part in rope_tables(places, config.head_dim, config.rope_base, x)
    )
    for i, block in enumerate(decoder.layers()):
        q, k, v, _ = block.project(x)
        k, v = torch.cat((keys[i], rotate(k, cos, sin))), torch.cat((values[i], v))
        x = block.finish(x, attend(rotate(q, cos, sin), k, v, mask)[0])
    assert relative(logits, decoder.head(x, None, None, None)) < 1e-12


def test_positions_stay_inside_the_chunk_and_decoding_goes_on_from_the_last() -> None:
    decoder = model_of()
    for context_len in (1, 10, 11, 39, 80):
        prompt = prompt_of(context_len)
        compact = read(decoder, prompt)
        positions = compact.positions[: compact.num_tokens]
        assert int(positions.max()) < 15
        assert compact.next_position == int(positions[-1]) + 1
        assert compact.num_tokens == min(13, context_len + 5)
        # Affixes are never pruned, and their tokens are where they were.
        assert positions[:3].tolist() == [0, 1, 2]
        assert positions[-2:].tolist() == [compact.next_position - 2, compact.next_position - 1]


def test_decoding_ends_with_the_positions_the_model_was_trained_on() -> None:
    decoder = model_of()
    compact = read(decoder, prompt_of(20), segment_len=17)
    assert compact.next_position == 15
    for _ in range(2):
        continue_from(compact, 0)
    with pytest.raises(ValueError, match="position 17 is past the segment_len=17"):
        continue_from(compact, 0)


@pytest.mark.parametrize("num_layers", [6, 7, 12, 32])
@pytest.mark.parametrize("warmup_layers", [0, 2])
@pytest.mark.parametrize("context_len", [0, 1, 10, 11, 20, 21, 77, 80])
def test_every_token_is_in_one_leaf_and_every_layer_on_one_level(
    context_len: int, warmup_layers: int, num_layers: int
) -> None:
    plan = plan_merge(
        context_len,
        5,
        chunk_len=15,
        target_len=15,
        num_layers=num_layers,
        warmup_layers=warmup_layers,
    )
    assert sum(plan.leaves) == context_len
    assert max(plan.leaves) - min(plan.leaves) <= 1
    assert max(plan.leaves) <= 10
    levels = len(plan.layers)
    assert len(plan.leaves) == 2 ** (levels - 1)
    assert plan.keep == [5] * (levels - 1) + [10]
    assert levels == 1 or len(plan.leaves) < 2 * math.ceil(context_len / 10)
    assert [i for layers in plan.layers for i in layers] == list(range(num_layers))
    share = (num_layers - warmup_layers) // levels
    assert [len(layers) for layers in plan.layers[1:]] == [share] * (levels - 1)
    assert len(plan.layers[0]) >= warmup_layers + share


def test_pending_chunks_grow_with_the_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def tracked(hidden: Tensor, *rest: object) -> Rows:
        nonlocal most
        alive.append(weakref.ref(hidden))
        most = max(most, sum(each() is not None for each in alive))
        return Rows(hidden, *rest)

    monkeypatch.setattr(model.homer, "Rows", tracked)
    decoder = model_of(layers=8)
    for height in range(7):
        alive.clear()
        most = 0
        read(decoder, prompt_of(10 * 2**height), warmup_layers=0)
        assert len(alive) == 4 * 2**height - 2  # every node before and after its layers
        assert most <= height + 2


def test_calibration_is_the_mean_score_at_each_distance() -> None:
    decoder, texts = model_of(layers=2), [some(9, 6), some(12, 7)]
    bias = calibrate(decoder, texts)
    found: dict[tuple[int, int], list[float]] = {}
    with torch.no_grad():
        for tokens in texts:
            places, x = torch.arange(len(tokens)), decoder.embed(tokens)
            mask = torch.ones(len(x), len(x)).tril().bool()
            for i, block in enumerate(decoder.layers()):
                q, k, v, _ = block.project(x)
                cos, sin = (part.unsqueeze(1) for part in rope_tables(places, 8, 10_000.0, x))
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
                for a in range(len(x)):
                    for b in range(a + 1):
                        score = max(float(q[a, h] @ k[b, h // 2]) for h in range(4)) / math.sqrt(8)
                        found.setdefault((i, a - b), []).append(score)
                x = block.finish(x, attend(q, k, v, mask)[0])
    assert bias.shape == (2, 12)
    for (layer, distance), scores in found.items():
        assert float(bias[layer, distance]) == pytest.approx(sum(scores) / len(scores), rel=1e-5)


def test_bfloat16_stays_bfloat16_and_finite() -> None:
    decoder = model_of(dtype=torch.bfloat16)
    compact = read(decoder, prompt_of(80), bias=calibrate(decoder, [some(15, 8)]))
    assert compact.keys.dtype == compact.logits.dtype == torch.bfloat16
    assert continue_from(compact, 3).isfinite().all()


def test_nothing_is_left_for_a_backward_pass() -> None:
    compact = read(model_of(), prompt_of(20))
    assert not compact.logits.requires_grad
    assert not continue_from(compact, 1).requires_grad


def refused(**changes: object) -> str:
    given: dict[str, object] = {"prompt": prompt_of(40), "decoder": model_of()}
    given |= changes
    decoder, prompt = given.pop("decoder"), given.pop("prompt")
    assert isinstance(decoder, Decoder)
    assert isinstance(prompt, Prompt)
    with pytest.raises(ValueError) as error:
        read(decoder, prompt, **given)
    return str(error.value)


def test_what_cannot_be_merged_is_refused() -> None:
    assert "model.memory=window reads" in refused(decoder=model_of(WindowMemory(1)))
    assert "use at least 7" in refused(chunk_len=6)
    assert "chunk_len=80 is above segment_len=64" in refused(chunk_len=80)
    assert "target_len=5 is not in 6..15" in refused(target_len=5)
    assert "target_len=16 is not in 6..15" in refused(target_len=16)
    assert "warmup_layers=7 is not in 0..6" in refused(warmup_layers=7)
    assert "the suffix is empty" in refused(prompt=prompt_of(40, suffix_len=0))
    assert "bias is [7, 14]" in refused(bias=torch.zeros(7, 14))
    assert "bias is [6, 15]" in refused(bias=torch.zeros(6, 15))
    with pytest.raises(ValueError, match="no texts"):
        calibrate(model_of(), [])


def test_a_context_that_needs_more_levels_than_layers_is_refused_with_the_longest_that_fits() -> (
    None
):
    decoder = model_of()
    assert "use at most 160 tokens of context" in refused(prompt=prompt_of(161))
    read(decoder, prompt_of(160))


def test_what_cannot_be_truncated_is_refused() -> None:
    decoder = model_of()
    with pytest.raises(ValueError, match="does not hold prefix and suffix"):
        truncated(decoder, *prompt_of(9), chunk_len=4, segment_len=SEGMENT_LEN)
    with pytest.raises(ValueError, match="the prompt is empty"):
        truncated(decoder, *prompt_of(0, 0, 0), chunk_len=4, segment_len=SEGMENT_LEN)
