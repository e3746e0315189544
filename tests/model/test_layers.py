"""Norm, rotation, projections and FFN, each against a direct formula."""

import math

import pytest
import torch
from torch.nn import functional

from model.config import ComputeConfig, ModelConfig, NoMemory, WindowMemory
from model.layers import QKV, RMSNorm, SwiGLU
from model.local import LocalLinears
from model.rope import rope_tables, rotate
from tests.compare import relative
from tests.model.small import build, config_of


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rms_norm_is_x_over_its_root_mean_square() -> None:
    norm, x = RMSNorm(6, 1e-2).double(), random(3, 6)
    norm.weight.data = random(6, seed=1)
    rms = (x.pow(2).sum(-1, keepdim=True) / 6 + 1e-2) ** 0.5
    assert relative(norm(x), norm.weight * x / rms) < 1e-15


def test_rms_norm_of_bfloat16_squares_in_float32() -> None:
    """In bfloat16 the sum of 4096 equal squares stops at 256."""
    norm = RMSNorm(4096, 1e-5).bfloat16()
    out = norm(torch.full((1, 4096), 3.0, dtype=torch.bfloat16))
    assert torch.equal(out, torch.ones_like(out))


def test_a_norms_weight_is_marked_as_meeting_scattered_rows() -> None:
    assert RMSNorm(6, 1e-5).weight.sequence_parallel is True


def test_rope_tables_at_position_131072_are_rounded_once() -> None:
    """A product of float32 position and float32 frequency would be off by up to 0.008 rad."""
    positions = torch.tensor([1, 4095, 131071, 131072])
    cos, sin = rope_tables(positions, 128, 10_000.0, torch.zeros(1))
    assert cos.dtype == sin.dtype == torch.float32
    for i, place in enumerate(positions.tolist()):
        for j in range(64):
            angle = place * 10_000.0 ** (-2 * j / 128)
            assert abs(cos[i, j].item() - math.cos(angle)) < 1e-7
            assert abs(sin[i, j].item() - math.sin(angle)) < 1e-7


def test_rope_tables_of_a_bfloat16_model_are_float32() -> None:
    cos, _ = rope_tables(torch.arange(3), 8, 10_000.0, torch.zeros(1, dtype=torch.bfloat16))
    assert cos.dtype == torch.float32


def test_rotations_are_made_once_for_segments_of_one_shape() -> None:
    model = build(config_of(WindowMemory(1)), torch.float32)
    starts = torch.zeros(1, 3, dtype=torch.bool)

    def rotations(segments: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(1, segments, length, dtype=torch.int64)
        found = model.segments(tokens, starts[:, :segments], fresh=False)
        return found.cos, found.sin

    with torch.inference_mode():
        first = rotations(3, 8)
    again = rotations(3, 8)
    assert all(x is y and not x.is_inference() for x, y in zip(first, again, strict=True))
    for segments, length in ((2, 8), (3, 4), (3, 8)):
        positions = torch.arange(1 + segments).unsqueeze(1) * length + torch.arange(length)
        expected = rope_tables(positions, 8, model.config.rope_base, torch.zeros(1))
        for x, y in zip(rotations(segments, length), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
    wide = model.double().segments(torch.zeros(1, 3, 8, dtype=torch.int64), starts, fresh=False)
    assert wide.cos.dtype == torch.float64


def test_rotated_products_depend_on_distance_alone() -> None:
    q, k = random(1, 1, 16), random(1, 1, 16, seed=1)

    def product(query_at: int, key_at: int) -> torch.Tensor:
        def at(x: torch.Tensor, place: int) -> torch.Tensor:
            tables = rope_tables(torch.tensor([place]), 16, 10_000.0, x)
            return rotate(x, *(t.unsqueeze(-2) for t in tables))

        return (at(q, query_at) * at(k, key_at)).sum()

    near = product(11, 4)
    assert relative(product(131_079, 131_072), near) < 1e-9
    assert relative(product(12, 4), near) > 1e-3


def test_rotation_keeps_length_and_position_0() -> None:
    x = random(4, 2, 16)
    tables = [t.unsqueeze(-2) for t in rope_tables(torch.arange(4), 16, 100.0, x)]
    rotated = rotate(x, *tables)
    assert relative(rotated.norm(dim=-1), x.norm(dim=-1)) < 1e-14
    assert torch.equal(rotated[0], x[0])


def test_rotation_turns_the_half_split_pair_by_position_times_frequency() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    cos, sin = rope_tables(torch.tensor([3]), 4, 100.0, x)
    expected = torch.tensor([[math.cos(3), 0, math.sin(3), 0]], dtype=torch.float64)
    assert relative(rotate(x, cos, sin), expected) < 1e-15


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_qkv_is_three_projections_grouped_by_key_head(heads: int, kv_heads: int) -> None:
    config = config_of(NoMemory(), num_heads=heads, num_kv_heads=kv_heads)
    qkv, x = QKV(config, LocalLinears()).double(), random(5, 16)
    group, width = heads // kv_heads, config.head_dim
    rows = qkv.linear.weight.view(kv_heads, (group + 2) * width, 16)
    by_head = {
        "q": torch.cat([head[: group * width] for head in rows]),
        "k": torch.cat([head[group * width : (group + 1) * width] for head in rows]),
        "v": torch.cat([head[(group + 1) * width :] for head in rows]),
    }
    *parts, extra = qkv(x)
    assert extra.numel() == 0
    for part, weight in zip(parts, by_head.values(), strict=True):
        assert part.shape == (5, weight.shape[0] // width, width)
        assert relative(part.flatten(1), x @ weight.T) < 1e-14


@pytest.mark.parametrize("chunk", [None, 1, 4, 6, 100])
def test_swiglu_is_down_of_silu_gate_times_up(chunk: int | None) -> None:
    config: ModelConfig = config_of(NoMemory())
    ffn, x = (
        SwiGLU(config, LocalLinears(), ComputeConfig(ffn_chunk=chunk)).double(),
        random(6, 16).requires_grad_(),
    )
    gate, up = ffn.gate_up.weight[:24], ffn.gate_up.weight[24:]
    expected = (functional.silu(x @ gate.T) * (x @ up.T)) @ ffn.down.weight.T
    upstream = random(6, 16, seed=1)
    inputs = (x, ffn.gate_up.weight, ffn.down.weight)
    assert relative(ffn(x), expected) < 1e-14
    for own, direct in zip(
        torch.autograd.grad(ffn(x), inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        assert relative(own, direct) < 1e-13


def test_swiglu_in_chunks_keeps_nothing_of_the_intermediate() -> None:
    config, saved = config_of(NoMemory(), ffn_size=512), []
    ffn, x = (
        SwiGLU(config, LocalLinears(), ComputeConfig(ffn_chunk=4)),
        torch.randn(32, 16, requires_grad=True),
    )
    weights = {p.data_ptr() for p in ffn.parameters()}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        ffn(x)
    assert all(t.numel() <= x.numel() for t in saved if t.data_ptr() not in weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 4, "num_kv_heads": 3},
            "num_heads=4 is not a multiple of num_kv_heads=3",
        ),
        ({"head_dim": 7}, "head_dim=7 is odd"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(NoMemory(), **changes)
