"""What keys of imported models must satisfy: each rule's whole message, and that it can pass."""

from typing import Any

import pytest

from tests.train.runs import problems, small
from train.settings.config import validate

LLAMA3 = {"type": "llama3", "factor": 8, "original_len": "8k"}
FAM = {"name": "fam", "slots": 8, "window": 1}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model__rope_scaling": {"factor": 8}},
            "model.rope_scaling.factor: 8 does nothing while model.rope_scaling.type is none; set"
            " type to linear or llama3, or leave factor out",
        ),
        (
            {"model__rope_scaling": {"type": "linear", "factor": 0.5}},
            "model.rope_scaling.factor: 0.5 would quicken the rotation, for shorter lengths; use 1"
            " or more",
        ),
        (
            {"model__rope_scaling": {**LLAMA3, "low_freq_factor": 4}},
            "model.rope_scaling.high_freq_factor: 4 is not above"
            " model.rope_scaling.low_freq_factor = 4, and frequencies between the two go from one"
            " to the other; use more than 4",
        ),
        (
            {"model__rope_scaling": {"type": "yarn", "factor": 8}},
            "model.rope_scaling.type: 'yarn' is not one of none, linear, llama3",
        ),
        (
            {"model__sliding_window": 100, "model__memory": FAM, "data__segment_len": 64},
            "model.sliding_window: the model was trained with 100 keys a token, but a token reads"
            " its segment and 1 before it, 128 tokens; use data.segment_len 50 or less, or leave"
            " sliding_window out to train the model to read further",
        ),
        (
            {"model__sliding_window": 63, "model__memory": "none", "data__segment_len": 64},
            "model.sliding_window: the model was trained with 63 keys a token, but a token reads"
            " its segment, 64 tokens; use data.segment_len 63 or less, or leave sliding_window out"
            " to train the model to read further",
        ),
    ],
)
def test_a_broken_rule_says_value_limit_and_remedy(changes: dict[str, Any], line: str) -> None:
    assert list(problems(small(**changes))) == [line]


def test_the_rules_can_be_kept() -> None:
    config = validate(
        small(model__rope_scaling=LLAMA3, model__sliding_window="4k", model__memory=FAM)
    )
    assert config.model.rope_scaling.original_len == 8192
    assert config.model.sliding_window == 4096


def test_a_list_of_memories_has_the_widest_window() -> None:
    changes = {"model__memory": ["infini", {"name": "window", "segments": 2}]}
    validate(small(**changes, model__sliding_window=192, data__segment_len=64))
    with pytest.raises(ValueError, match="its segment and 2 before it, 192 tokens"):
        validate(small(**changes, model__sliding_window=191, data__segment_len=64))
