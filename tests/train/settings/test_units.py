"""Token lengths, durations and numbers as people write them."""

from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from tests.train.runs import small, write
from train.settings.config import load
from train.settings.units import Count, Duration, Positive, TokenLength


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (8192, 8192),
        ("8192", 8192),
        ("32k", 32768),
        ("32K", 32768),
        ("1.5k", 1536),
        ("1M", 1 << 20),
    ],
)
def test_token_lengths_have_units(text: object, tokens: int) -> None:
    assert TypeAdapter(TokenLength).validate_python(text) == tokens


@pytest.mark.parametrize("text", ["32kb", "-1k", "1.3k", "0", "", None, True, 1.5, [1], "1e3"])
def test_what_is_no_token_length_is_refused(text: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(TokenLength).validate_python(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (90, 90.0),
        ("90", 90.0),
        ("90s", 90.0),
        ("30min", 1800.0),
        ("1h30min", 5400.0),
        ("2d", 172800.0),
    ],
)
def test_durations_have_units(text: object, seconds: float) -> None:
    assert TypeAdapter(Duration).validate_python(text) == seconds


@pytest.mark.parametrize("text", ["30m", "soon", "0s", -1, None, True, "nan", "min"])
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Duration).validate_python(text)


def test_units_work_in_yaml_and_in_an_override(tmp_path: Path) -> None:
    path = write(tmp_path, small(data__segment_len="1k", data__sample_len="4k"))
    config = load(path, ["data.sample_len=8k", "parallel.timeout_s=30min"])
    assert (config.data.segment_len, config.data.sample_len) == (1024, 8192)
    assert config.parallel.timeout_s == 1800.0


def test_exponents_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    text = yaml.safe_dump(small(train__lr=0)).replace("lr: 0", "lr: 3e-4")
    assert isinstance(yaml.safe_load(text)["train"]["lr"], str)
    config = load(write(tmp_path, text), ["train.min_lr=1e-5", "train.steps=1e3"])
    assert (config.train.lr, config.train.min_lr, config.train.steps) == (3e-4, 1e-5, 1000)


@pytest.mark.parametrize("value", [True, "nan", "inf", float("nan"), "", None, "1,5", 10**400])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Positive).validate_python(value)


def test_whole_numbers_keep_every_digit() -> None:
    assert TypeAdapter(Count).validate_python(2**62 + 1) == 2**62 + 1
    assert TypeAdapter(Count).validate_python(str(2**62 + 1)) == 2**62 + 1
