"""Published speeds agree with one another, and come out on our basis."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from train.cli import app
from train.speed.converted import RECOMPUTED

MODEL = "configs/pretrain_8b.yaml"


def converted(*words: str) -> dict[str, float]:
    result = CliRunner().invoke(app, ["convert-mfu", MODEL, "--json", *words])
    assert result.exit_code == 0, result.output
    told: dict[str, float] = json.loads(result.output)
    return told


def test_torchtitans_figures_of_the_8b_model_agree_with_one_another() -> None:
    # 6,667 tokens/s on an H100 at 8k, printed as 39 % with attention as a whole square
    by_speed = converted("--length", "8k", "--tokens-per-s", "6667", "--basis", "full")
    assert by_speed["theirs_mfu"] == pytest.approx(0.390, abs=0.0015)
    assert by_speed["ours_mfu"] == pytest.approx(0.347, abs=0.0015)
    by_mfu = converted("--length", "8k", "--mfu", str(by_speed["theirs_mfu"]), "--basis", "full")
    assert by_mfu == pytest.approx(by_speed)


def test_alsts_million_tokens_count_the_forward_twice() -> None:
    # 244 tokens/s a GPU at 1.1M tokens, printed as 576.1 TFLOP/s
    words = ("--length", "1075k", "--basis", "full", "--recomputed")
    found = converted(*words, "--tflops", "576.1")
    assert found["ours_mfu"] == pytest.approx(0.224, abs=0.003)
    assert found["tokens_per_s"] == pytest.approx(244, rel=0.04)
    plain = converted(*words[:-1], "--tokens-per-s", "244")
    again = converted(*words, "--tokens-per-s", "244")
    assert again["theirs_flops"] == pytest.approx(RECOMPUTED * plain["theirs_flops"])


def test_our_own_basis_is_the_one_that_training_logs() -> None:
    found = converted("--tokens-per-s", "1000", "--basis", "causal")
    assert found["theirs_mfu"] == found["ours_mfu"]
    six = converted("--tokens-per-s", "1000", "--basis", "6n")
    assert six["theirs_flops"] == pytest.approx(1000 * 6 * 8_030_261_248, rel=0.01)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "give one figure above 0"),
        (("--mfu", "0.4", "--tflops", "300"), "give one figure above 0"),
        (("--mfu", "39"), "--mfu 39 is above 1, and it is a share of the peak; did you mean 0.39?"),
        (("--mfu", "0.4", "--basis", "ful"), "did you mean 'full'"),
        (("--mfu", "0.4", "--length", "8Q"), "expected a number of tokens"),
    ],
)
def test_what_cannot_be_converted_is_refused(words: tuple[str, ...], problem: str) -> None:
    result = CliRunner().invoke(app, ["convert-mfu", MODEL, *words])
    assert isinstance(result.exception, ValueError) and problem in str(result.exception)
