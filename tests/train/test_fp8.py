"""What train.fp8 asks of the other fields, and a run with it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.float8 import Float8Linear
from tests.train.runs import longhaul, problems, small, write
from tests.train.tiny import Shards, tiny
from train.checkpoints.snapshot import read_model
from train.settings.config import validate

FP8 = {"train__fp8": True, "train__precision": "bf16"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"train__precision": "fp32"},
            "train.fp8: true rounds the factors of products whose results are bfloat16, and"
            " train.precision = fp32; set it to bf16, or leave fp8 out",
        ),
        (
            {"model__hidden_size": 72, "model__head_dim": 16},
            "train.fp8: true needs features of a multiple of 16 on each rank, and"
            " model.hidden_size = 72 is none of 16; use 64 or 80",
        ),
        (
            {"model__ffn_size": 48, "parallel__tp": 2},
            "train.fp8: true needs features of a multiple of 16 on each rank, and"
            " model.ffn_size = 48 is none of 16 * parallel.tp = 32; use 32 or 64",
        ),
        (
            {"model__head_dim": 8, "parallel__tp": 2},
            "train.fp8: true needs features of a multiple of 16 on each rank, and num_kv_heads /"
            " tp * head_dim = 2 / 2 * 8 is none; use a head_dim of a multiple of 16",
        ),
        (
            {"model__memory": {"name": "abc", "slots": 5}},
            "train.fp8: true needs features of a multiple of 16 on each rank, and abc's slots *"
            " num_kv_heads / tp = 5 * 2 / 1 is none; use 8 slots",
        ),
        (
            {"model__memory": {"name": "armt", "slots": 4}, "train__wavefront": True},
            "train.fp8: true has no products of many layers at once, which train.wavefront makes;"
            " use one",
        ),
    ],
)
def test_a_broken_rule_says_value_limit_and_remedy(changes: dict[str, Any], line: str) -> None:
    assert problems(small(**FP8 | changes)) == (line,)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__ffn_size": 64, "parallel__tp": 2},
        {"model__memory": {"name": "abc", "slots": 8}},
        {"model__memory": {"name": "abc", "slots": 16}, "parallel__tp": 2},
    ],
)
def test_the_limit_itself_is_valid(changes: dict[str, Any]) -> None:
    assert validate(small(**FP8 | changes)).train.fp8


@pytest.mark.slow
def test_a_run_in_fp8_is_read_without_it_and_goes_on_with_or_without(
    tmp_path: Path, shards: Shards
) -> None:
    raw = tiny(
        tmp_path / "run", shards, model__hidden_size=64, train__steps=4, train__warmup_steps=1,
        train__precision="bf16", train__fp8=True, checkpoint__every=2,
    )  # fmt: skip
    path = write(tmp_path, raw)
    ended = longhaul("pretrain", path)
    assert ended.returncode == 0, ended.stderr
    model, config = read_model(tmp_path / "run")
    assert config.train.fp8
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(isinstance(each, Float8Linear) for each in model.modules())
    onward = longhaul("pretrain", path, "train.steps=6", "train.fp8=false")
    assert onward.returncode == 0, onward.stderr
    assert "train.fp8" in onward.stderr
