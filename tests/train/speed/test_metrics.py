"""FLOPs and peaks against hand arithmetic."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import (
    AbcMemory,
    ArmtMemory,
    CmabMemory,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    LandmarkMemory,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    NoMemory,
    RmtMemory,
    WindowMemory,
    compose,
)
from model.decoder import Decoder
from train.speed.metrics import (
    Flops,
    Peak,
    forward_flops_per_token,
    listed_peak,
    measure_peak,
    mfu,
    peak_flops,
    training_flops_per_token,
)

LLAMA_8B = ModelConfig(
    vocab_size=128256,
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    ffn_size=14336,
    head_dim=128,
)
TINY = ModelConfig(
    vocab_size=50,
    num_layers=2,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    ffn_size=12,
    head_dim=4,
)


def test_llama_3_8b_at_8k_spends_an_eighth_of_its_flops_on_attention() -> None:
    # 6 x 7.505e9 parameters without the lookup, 6 x layers x hidden x S for causal attention
    flops = forward_flops_per_token(LLAMA_8B, 8192)
    assert flops.attention / sum(flops) == pytest.approx(0.125, abs=5e-4)
    assert 3 * flops.matrices == pytest.approx(6 * 7.5046e9, rel=1e-4)
    assert 3 * flops.attention == pytest.approx(6 * 32 * 4096 * 8193, rel=1e-9)
    assert flops.memory == 0


def test_llama_3_8b_reproduces_published_throughput() -> None:
    # torchtitan on H100: 5762 tokens/s of one GPU at 8k are 297 TFLOP/s, causal: 30.0 % MFU
    flops = training_flops_per_token(LLAMA_8B, 8192)
    assert 5762 * flops == pytest.approx(297e12, rel=2e-3)
    peak = listed_peak("NVIDIA H100 80GB HBM3", "bf16", tf32=False)
    assert peak is not None
    assert mfu(8 * 5762, flops, peak, ranks=8) == pytest.approx(0.300, abs=5e-4)


def test_frozen_matrices_have_no_gradient_to_count_and_adapters_have() -> None:
    lora = LoraConfig(rank=3, targets=("qkv", "down"))
    base, tuned = (forward_flops_per_token(replace(TINY, lora=x), 16) for x in (None, lora))
    adapters = 2 * 2 * 3 * ((8 + 16) + (12 + 8))  # layers, a multiply-add, rank, in and out
    assert tuned == base._replace(matrices=base.matrices + adapters)
    whole, some = (training_flops_per_token(replace(TINY, lora=x), 16) for x in (None, lora))
    assert some == whole - base.matrices + 3 * adapters
    also = replace(lora, train_also=("embeddings",))
    assert training_flops_per_token(replace(TINY, lora=also), 16) == some + 2 * 8 * 50


def test_matrices_are_the_two_dimensional_parameters_without_the_lookup() -> None:
    decoder = Decoder(replace(TINY, vocab_size=64))  # 64: no padding
    matrices = sum(p.numel() for p in decoder.parameters() if p.ndim == 2)
    lookup = decoder.embedding.weight.numel()
    flops = forward_flops_per_token(replace(TINY, vocab_size=64), 16)
    assert flops.matrices == 2 * (matrices - lookup)


def test_padding_and_tying_of_the_vocabulary_change_nothing() -> None:
    flops = forward_flops_per_token(TINY, 16)
    more = forward_flops_per_token(replace(TINY, vocab_size=51), 16)
    assert more.matrices - flops.matrices == 2 * 8
    assert forward_flops_per_token(replace(TINY, tie_embeddings=True), 16) == flops


def test_a_window_adds_whole_segments_of_keys() -> None:
    none = forward_flops_per_token(TINY, 16)
    window = forward_flops_per_token(replace(TINY, memory=WindowMemory(segments=3)), 16)
    assert none.attention == 4 * 2 * (2 * 4) * 8.5
    assert window.attention == 4 * 2 * (2 * 4) * (8.5 + 3 * 16)
    assert (window.matrices, window.memory) == (none.matrices, 0)


def test_fam_slots_are_keys_and_rows() -> None:
    memory = FamMemory(slots=4, window=1)
    flops = forward_flops_per_token(replace(TINY, memory=memory), 16)
    block = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 12
    assert flops.attention == 4 * 2 * 8 * (8.5 + 16 + 4)
    # 4 rows in 16 tokens: a quarter row a token, reading its segment and the slots
    assert flops.memory == 0.25 * (2 * 2 * block + 4 * 2 * 8 * (16 + 4))


def cost(memory: MemoryConfig, segment_len: int = 16) -> Flops:
    return forward_flops_per_token(replace(TINY, memory=memory), segment_len)


ROW = 2 * (8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 12)
"""FLOPs of a row in one block of TINY: D 8, QKV 8 + 4 + 4, FFN 12; no scores."""
KEY = 4 * 8
"""Of a query and a key in one block: 2 heads of 4, q k^T and p v."""


def test_infini_reads_a_matrix_a_head_and_writes_one_a_key_head() -> None:
    plain = cost(NoMemory())
    linear, delta = cost(InfiniMemory()), cost(InfiniMemory("delta"))
    assert (linear.matrices, linear.attention) == (plain.matrices, plain.attention)
    # 2 layers, 2 query heads and 1 key head, 4 x 4 each; delta reads what it will overwrite
    assert linear.memory == 2 * 2 * (2 + 1) * 16
    assert delta.memory == 2 * 2 * (2 + 1 + 1) * 16


def test_slots_are_keys_and_every_token_is_written_to_each() -> None:
    plain = cost(NoMemory())
    abc, cmab = cost(AbcMemory(slots=3)), cost(CmabMemory(latents=3, window=1))
    assert abc.attention - plain.attention == 2 * KEY * 3
    assert cmab.attention - plain.attention == 2 * KEY * (3 + 16)
    # abc: a score of 8 features each; cmab: of a key of 4; both add key and value to each mean
    assert abc.memory == 2 * 2 * (8 * 3 + 3 * 8)
    assert cmab.memory == 2 * 2 * (4 * 3 + 3 * 8)


def test_rmt_rows_go_through_all_blocks_twice() -> None:
    paper, causal = cost(RmtMemory(slots=4)), cost(RmtMemory(slots=4, mask="causal"))
    assert paper.attention == 2 * KEY * (8.5 + 4)
    # 4 rows read 4; 4 rows read 4 + 16 tokens + 4
    assert paper.memory == 2 * (8 * ROW + KEY * (16 + 4 * 24)) / 16
    # 4 rows read 1, 2, 3, 4; 4 rows read 4 + 16 and 1, 2, 3, 4
    assert causal.memory == 2 * (8 * ROW + KEY * (10 + 4 * 20 + 10)) / 16


def test_armt_reads_a_matrix_in_every_layer_and_its_rows_write_it() -> None:
    found, plain = cost(ArmtMemory(slots=4, key_dim=3)), cost(NoMemory())
    assert found.attention == plain.attention
    rows = 4 * ROW + KEY * 4 * 20
    # a query of 3 is 18 features; 16 tokens and 4 rows ask; rows make key, value and strength,
    # and take what the matrix says from what they write
    read, write = 8 * 3 + 18 * 8, 8 * (3 + 8 + 1) + 2 * 18 * 8
    assert found.memory == pytest.approx(2 * (rows + 2 * (20 * read + 4 * write)) / 16)


def test_hmt_reads_half_a_segment_twice_and_searches() -> None:
    found = cost(HmtMemory(bank=5, sensory=2, search_dim=3))
    # the last memory and 2 sensory rows; half of the tokens read what was found
    assert found.attention == 2 * KEY * (8.5 + 3 + 0.5)
    # found 1, last 1, sensory 2 and 3, behind all 4 rows before it, itself and 16 tokens
    around = 5 * ROW + KEY * (1 + 1 + 2 + 3 + 21)
    # 8 tokens read 1 .. 8 and a row before them, which reads itself; one behind reads all 10
    summary = 10 * ROW + KEY * (36 + 8 + 1 + 10)
    # a query, 5 keys, 5 scores, a mean of 5
    search = 2 * (8 * 3 + 5 * 8 * 3 + 5 * 3 + 5 * 8)
    assert found.memory == pytest.approx((2 * (around + summary) + search) / 16)


def test_landmarks_are_tokens_and_retrieved_blocks_keys() -> None:
    assert cost(LandmarkMemory(block=4, window=1)) == cost(WindowMemory(1))
    found, plain = cost(LandmarkMemory(block=4, retrieve=3)), cost(NoMemory())
    assert found.attention - plain.attention == 2 * KEY * 12
    assert found.memory == 0


def test_landmark_in_the_last_layer_looks_further_in_that_one_alone() -> None:
    everywhere = cost(LandmarkMemory(block=4, window=2, retrieve=3))
    last = cost(LandmarkMemory(block=4, window=2, retrieve=3, layers="last"))
    plain = cost(NoMemory()).attention
    assert last.attention - plain == (everywhere.attention - plain) / 2  # of two layers


def test_composed_memories_cost_what_each_costs() -> None:
    parts = [FamMemory(slots=4), InfiniMemory(), AbcMemory(slots=3)]
    both = cost(compose([WindowMemory(2), *parts]))
    each = [cost(part) for part in parts]
    window = cost(WindowMemory(2)).attention
    plain = cost(NoMemory()).attention
    assert both.memory == sum(flops.memory for flops in each)
    assert both.attention - window == sum(flops.attention - plain for flops in each)


def test_the_8b_run_pays_little_for_its_slots() -> None:
    memory = FamMemory(slots=64, window=1)
    flops = forward_flops_per_token(replace(LLAMA_8B, memory=memory), 16384)
    assert 0.003 < flops.memory / sum(flops) < 0.006


def test_training_is_three_forwards() -> None:
    assert training_flops_per_token(TINY, 16) == 3 * sum(forward_flops_per_token(TINY, 16))


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 494.7e12, 67e12),
        ("NVIDIA H100 PCIe", 756.5e12, 378e12, 51e12),
        ("NVIDIA H100 NVL", 835.5e12, 417.5e12, 60e12),
        ("NVIDIA H200", 989.5e12, 494.7e12, 67e12),
        ("NVIDIA H20", 148e12, 74e12, 44e12),
        ("NVIDIA GH200 480GB", 989.5e12, 494.7e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12, 19.5e12),
        ("NVIDIA B200", 2250e12, 1125e12, 75e12),
        ("NVIDIA GB200", 2500e12, 1250e12, 80e12),
    ],
)
def test_listed_gpus(name: str, bf16: float, tf32: float, fp32: float) -> None:
    found = [
        listed_peak(name, "bf16", tf32=False),
        listed_peak(name, "fp32", tf32=True),
        listed_peak(name, "fp32", tf32=False),
    ]
    assert [peak.flops_per_s for peak in found if peak] == [bf16, tf32, fp32]
    assert found[0] and found[0].source == f"{name} data sheet, bf16 dense"


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "NVIDIA H200 MIG 1g.18gb"])
def test_an_unknown_gpu_and_a_part_of_one_have_no_listed_peak(name: str) -> None:
    assert listed_peak(name, "bf16", tf32=False) is None


def test_a_cpu_is_measured_in_under_half_a_second() -> None:
    for precision in ("fp32", "bf16"):
        begin = time.process_time()
        peak = peak_flops(torch.device("cpu"), precision)  # type: ignore[arg-type]
        assert time.process_time() - begin < 0.5
        assert peak.source == "measured matmul"
        assert 1e8 < peak.flops_per_s < 1e14


def test_a_slow_processor_is_measured_with_small_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []

    def slow(size: int, *_: Any) -> float:
        sizes.append(size)
        return 1e9

    monkeypatch.setattr("train.speed.metrics._BUDGET_S", 0.01)
    monkeypatch.setattr("train.speed.metrics._matmul_rate", slow)
    measure_peak(torch.device("cpu"), "bf16")
    assert max(sizes) == 256


def test_utilization_is_over_all_ranks() -> None:
    assert mfu(1000.0, 1e9, Peak(1e12, "test"), ranks=4) == 0.25
