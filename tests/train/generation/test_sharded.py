"""A prompt read by several ranks, against the same prompt read and continued on one device."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.attention import Alone
from model.compact import continue_from as continue_alone
from model.config import (
    FamMemory,
    LandmarkMemory,
    MemoryConfig,
    NoMemory,
    RopeScaling,
    WindowMemory,
)
from model.decoder import Decoder
from model.homer import truncated
from parallel.ring import choose_exchange
from tests.compare import relative
from tests.model.small import VOCAB, build, config_of
from tests.ranks import run_ranks
from train.generation.sharded import check_sharded, continue_from, read_prompt

SEGMENT_LEN = 48
BEHIND = [7, 0, 31, 31, 4]


def model_of(*, tied: bool = False) -> Decoder:
    scaling = RopeScaling(type="linear", factor=2.0)
    changes = {"num_layers": 3, "tie_embeddings": tied, "rope_scaling": scaling}
    return build(config_of(NoMemory(), **changes))


def prompt_of(count: int) -> Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(count))


def alone(count: int, tied: bool) -> list[Tensor]:
    """Logits [V] after the prompt, and after each token behind it, on one device."""
    nothing, whole = prompt_of(0), {"chunk_len": SEGMENT_LEN, "segment_len": SEGMENT_LEN}
    compact = truncated(model_of(tied=tied), nothing, prompt_of(count), nothing, **whole)
    return [compact.logits, *(continue_alone(compact, token) for token in BEHIND)]


def together(exchange: str, count: int, tied: bool) -> tuple[list[Tensor], list[int], int]:
    """Runs on a rank: the same logits; tokens that it holds, before and after; bytes of keys."""
    ranks = choose_exchange(exchange, dist.group.WORLD)
    sharded = read_prompt(model_of(tied=tied), prompt_of(count), ranks, SEGMENT_LEN)
    assert sharded.num_tokens == count
    held = [sharded.layers[0].num_held]
    logits = [sharded.logits, *(continue_from(sharded, token) for token in BEHIND)]
    assert sharded.num_tokens == count + len(BEHIND)
    assert torch.equal(sharded.logits, logits[-1])
    held.append(sharded.layers[0].num_held)
    assert {keys.num_held for keys in sharded.layers} == {held[-1]}
    return logits, held, sharded.nbytes


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("size", "count", "exchange", "tied"),
    [
        (2, 37, "ring", False),
        (2, 32, "ring", True),
        (2, 3, "ring", False),
        (3, 43, "ring", True),
        (3, 41, "all_gather", False),
        (3, 4, "ring", False),
        (3, 1, "ring", False),
    ],
)
def test_reading_and_continuing_on_ranks_equals_one_device(
    size: int, count: int, exchange: str, tied: bool
) -> None:
    expected = alone(count, tied)
    ranks = run_ranks(size, together, exchange, count, tied)
    for logits, _, _ in ranks:
        for found, wanted, first in zip(logits, expected, ranks[0][0], strict=True):
            assert relative(found, wanted) < 1e-10
            assert torch.equal(found, first)  # to the bit on every rank


@pytest.mark.gloo
@pytest.mark.parametrize(("size", "count"), [(2, 37), (3, 43), (3, 5), (3, 1)])
def test_keys_are_spread_over_the_ranks(size: int, count: int) -> None:
    ranks = run_ranks(size, together, "ring", count, False)
    for when, tokens in enumerate((count, count + len(BEHIND))):
        shares = [held[when] for _, held, _ in ranks]
        assert sum(shares) == tokens
        assert max(shares) <= -(-tokens // size) + 2
    config = model_of().config
    a_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 8  # k, v; float64
    assert [nbytes for *_, nbytes in ranks] == [held[1] * a_token for _, held, _ in ranks]


def test_one_rank_is_one_device() -> None:
    sharded = read_prompt(model_of(), prompt_of(11), Alone(), SEGMENT_LEN)
    logits = [sharded.logits, *(continue_from(sharded, token) for token in BEHIND)]
    for found, wanted in zip(logits, alone(11, False), strict=True):
        assert relative(found, wanted) < 1e-10


def test_the_last_position_is_used_and_no_further_one() -> None:
    sharded = read_prompt(model_of(), prompt_of(SEGMENT_LEN - 1), Alone(), SEGMENT_LEN)
    continue_from(sharded, 1)
    with pytest.raises(ValueError, match="position 48 is past the segment_len=48"):
        continue_from(sharded, 1)
    assert sharded.num_tokens == SEGMENT_LEN


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "the prompt is empty"), (49, "the prompt has 49 tokens, .* trained on segment_len=48")],
)
def test_a_prompt_that_is_none_or_too_long_is_refused(count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompt(model_of(), prompt_of(count), Alone(), SEGMENT_LEN)


@pytest.mark.parametrize("memory", [FamMemory(), WindowMemory(), LandmarkMemory(retrieve=2)])
def test_a_model_with_memory_has_nothing_to_share_out(memory: MemoryConfig) -> None:
    with pytest.raises(ValueError, match=f"{memory.name} reads .* over 4 ranks; run it in one"):
        check_sharded(memory, 4)
