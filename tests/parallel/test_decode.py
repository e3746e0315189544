"""Decoding over sharded keys, and the lean partition, against plain attention over all keys."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import Alone
from parallel.decode import attend, lean_attend, lean_partition, shard, tiles_of
from parallel.ring import choose_exchange
from tests.compare import relative
from tests.model import dense
from tests.ranks import run_ranks

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def read_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool)
    return dense.attend(q, k, v, mask)[0]


def prompt_and_tokens(prompt_len: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """k, v of a prompt; q, k, v of five tokens that are decoded one by one."""
    return (
        random(2, prompt_len, KEY_HEADS, HEAD_DIM, seed=0).to(dtype) * 3,
        random(2, prompt_len, KEY_HEADS, HEAD_DIM, seed=1).to(dtype),
        random(2, 5, HEADS, HEAD_DIM, seed=2).to(dtype),
        random(2, 5, KEY_HEADS, HEAD_DIM, seed=3).to(dtype) * 3,
        random(2, 5, KEY_HEADS, HEAD_DIM, seed=4).to(dtype),
    )


def decode(exchange: str, first: int, prompt_len: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Runs on a rank: rank 0 holds the prompt's first keys, the last rank the rest."""
    rank, size = dist.get_rank(), dist.get_world_size()
    k, v, q, new_k, new_v = prompt_and_tokens(prompt_len, dtype)
    mine = [slice(0, first), *[slice(0, 0)] * (size - 2), slice(first, None)][rank]
    cache = shard(k[:, mine], v[:, mine], choose_exchange(exchange, dist.group.WORLD))
    assert cache.num_tokens == prompt_len
    outs = []
    for t in range(5):
        one = slice(t, t + 1)
        cache = cache.append(new_k[:, one], new_v[:, one])
        outs.append(attend(q[:, one], cache))
    return torch.cat(outs, 1), cache.num_held


def expected(prompt_len: int, dtype: torch.dtype) -> Tensor:
    k, v, q, new_k, new_v = (x.double() for x in prompt_and_tokens(prompt_len, dtype))
    return torch.cat(
        [
            read_all(
                q[:, t : t + 1],
                torch.cat((k, new_k[:, : t + 1]), 1),
                torch.cat((v, new_v[:, : t + 1]), 1),
            )
            for t in range(5)
        ],
        1,
    )


@pytest.mark.gloo
@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
@pytest.mark.parametrize(("size", "first", "prompt_len"), [(2, 5, 12), (2, 0, 7), (3, 4, 9)])
def test_decoding_over_sharded_keys_equals_one_process(
    size: int, first: int, prompt_len: int, exchange: str
) -> None:
    ranks = run_ranks(size, decode, exchange, first, prompt_len, torch.float64)
    for out, _ in ranks:
        assert relative(out, expected(prompt_len, torch.float64)) < 1e-12
        assert torch.equal(out, ranks[0][0])  # to the bit on every rank
    assert sum(count for _, count in ranks) == prompt_len + 5


@pytest.mark.gloo
def test_a_prompt_of_no_tokens_decodes_and_spreads_over_the_ranks() -> None:
    ranks = run_ranks(2, decode, "ring", 0, 0, torch.float64)
    assert [count for _, count in ranks] == [3, 2]
    for out, _ in ranks:
        assert relative(out, expected(0, torch.float64)) < 1e-12


@pytest.mark.gloo
def test_bfloat16_is_merged_in_float32_and_comes_back_as_bfloat16() -> None:
    for out, _ in run_ranks(2, decode, "ring", 5, 12, torch.bfloat16):
        assert out.dtype == torch.bfloat16
        assert relative(out.double(), expected(12, torch.bfloat16)) < 2**-6


def test_one_device_is_the_case_of_one_share() -> None:
    k, v, q, new_k, new_v = prompt_and_tokens(6, torch.float64)
    cache = shard(k, v, Alone())
    whole = cache.append(new_k, new_v)
    assert cache.num_tokens == cache.num_held == 6  # returned, not mutated
    assert whole.num_tokens == whole.num_held == 11
    keys, values = torch.cat((k, new_k), 1), torch.cat((v, new_v), 1)
    assert relative(attend(q, whole), read_all(q, keys, values)) < 1e-12
    nothing = k[:, :0]
    with pytest.raises(ValueError, match="no rank holds a key"):
        attend(q, shard(nothing, nothing, Alone()))


def test_a_new_token_copies_nothing_of_the_prompt() -> None:
    k, v, _, new_k, new_v = prompt_and_tokens(6, torch.float64)
    cache = shard(k, v, Alone())
    for t in range(5):
        cache = cache.append(new_k[:, t : t + 1], new_v[:, t : t + 1])
    assert cache.k is k and cache.v is v


def spread(first: int, lengths: list[int]) -> list[int]:
    """Runs on a rank: the places of the tokens that it keeps, of some appended at once."""
    k = torch.arange(float(sum(lengths))).view(1, -1, 1, 1)
    empty = torch.zeros(1, first * (dist.get_rank() == 0), 1, 1)
    cache = shard(empty, empty, choose_exchange("ring", dist.group.WORLD))
    for part in k.split(lengths, 1):
        cache = cache.append(part, part)
    return cache.new_k.flatten().int().tolist()


@pytest.mark.gloo
@pytest.mark.parametrize("lengths", [[7], [1] * 7, [2, 0, 4, 1]])
def test_the_token_t_of_all_is_kept_by_rank_t_mod_size(lengths: list[int]) -> None:
    assert run_ranks(3, spread, 4, lengths) == [[2, 5], [0, 3, 6], [1, 4]]


contexts = st.lists(st.integers(0, 40), max_size=9)


@given(contexts, st.integers(1, 12), st.integers(1, 12))
@settings(deadline=None)
def test_every_tile_is_walked_once_in_order_and_loads_differ_by_one_at_most(
    lengths: list[int], tile: int, workers: int
) -> None:
    stretches = lean_partition(lengths, tile, workers)
    tiles = tiles_of(lengths, tile)
    assert len(stretches) == workers
    assert [i for stretch in stretches for i in stretch] == list(range(len(tiles)))
    loads = [len(stretch) for stretch in stretches]
    assert max(loads) - min(loads) <= 1
    keys = [(context, key) for context, first, end in tiles for key in range(first, end)]
    assert keys == [(c, key) for c, length in enumerate(lengths) for key in range(length)]
    assert all(0 < end - first <= tile for _, first, end in tiles)


@given(contexts, st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_lean_attention_is_attention(
    lengths: list[int], tile: int, workers: int, seed: int
) -> None:
    group = 3
    q = random(len(lengths), group, HEAD_DIM, seed=seed) * 3
    keys = [random(length, HEAD_DIM, seed=seed + i + 1) for i, length in enumerate(lengths)]
    values = [random(length, HEAD_DIM, seed=seed - i - 1) for i, length in enumerate(lengths)]
    out, lse = lean_attend(q, keys, values, tile=tile, workers=workers)
    for c, length in enumerate(lengths):
        if not length:
            assert torch.equal(out[c], torch.zeros(group, HEAD_DIM, dtype=torch.float64))
            assert torch.equal(lse[c], torch.full((group,), float("-inf"), dtype=torch.float64))
            continue
        mask = torch.ones(1, length, dtype=torch.bool)
        k, v = keys[c].unsqueeze(1), values[c].unsqueeze(1)
        plain, plain_lse = dense.attend(q[c].unsqueeze(0), k, v, mask)
        assert relative(out[c], plain[0]) < 1e-12
        assert relative(lse[c], plain_lse[0]) < 1e-12


def test_a_partition_without_workers_tiles_or_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="tile=0 and workers=2"):
        lean_partition([3], 0, 2)
    with pytest.raises(ValueError, match="tile=4 and workers=0"):
        lean_partition([3], 4, 0)
    with pytest.raises(ValueError, match="a context of -1 keys"):
        lean_partition([3, -1], 4, 2)
