"""`model.lora` as a section that may be left out: what it reads, and each bad value in one line."""

from typing import Any

import pytest
import yaml

from tests.train.runs import problems, small
from train.settings.config import apply_overrides, dump, parse_overrides, schema, validate

NAMES = "qkv, output, gate_up, down"


def raw(**lora: object) -> dict[str, Any]:
    return small(model__init_from="runs/base", model__lora={"rank": 8, **lora})


def test_left_out_or_null_or_overridden_by_null_all_weights_are_trained() -> None:
    assert validate(small()).model.lora is None
    assert validate(small(model__lora=None)).model.lora is None
    changed = apply_overrides(raw(), parse_overrides(["model.lora=null"]))
    assert validate(changed).model.lora is None


@pytest.mark.parametrize("targets", ["all", ["down", "qkv", "gate_up", "output", "qkv"]])
def test_targets_are_kept_in_one_order_and_once(targets: object) -> None:
    lora = validate(raw(targets=targets)).model.lora
    assert lora is not None
    assert lora.targets == ("qkv", "output", "gate_up", "down")


def test_a_resolved_configuration_loads_to_the_same() -> None:
    config = validate(raw(targets=["down"], train_also=["norms"]))
    assert validate(yaml.safe_load(dump(config))) == config


def test_overrides_reach_into_a_section_that_the_file_leaves_out() -> None:
    overrides = ["model.init_from=runs/a", "model.lora.rank=4", "model.lora.targets=[down]"]
    lora = validate(apply_overrides(small(), parse_overrides(overrides))).model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.targets) == (4, 16.0, ("down",))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rank": 0}, "model.lora.rank: 0 is too small; the least is 1"),
        ({"alpha": 0}, "model.lora.alpha: 0 is too small; it must be above 0"),
        (
            {"targets": ["qkv", "gate_upp"]},
            f"model.lora.targets: 'gate_upp' is not one of {NAMES}; did you mean 'gate_up'?",
        ),
        ({"targets": []}, f"model.lora.targets: names nothing; give some of {NAMES}, or all"),
        (
            {"targets": "down"},
            f"model.lora.targets: expected all or a list of {NAMES}, got 'down'",
        ),
        (
            {"train_also": ["norm"]},
            "model.lora.train_also: 'norm' is not one of norms, embeddings; did you mean 'norms'?",
        ),
        (
            {"dropout": 0.1},
            "model.lora.dropout: unknown key; known here: rank, alpha, targets, train_also",
        ),
    ],
)
def test_a_bad_value_is_one_line(changes: dict[str, Any], line: str) -> None:
    assert problems(raw(**changes)) == (line,)


def test_a_section_needs_its_keys() -> None:
    config = small(model__init_from="runs/base", model__lora={"alpha": 4})
    assert problems(config) == ("model.lora.rank: missing; width of the adapters",)
    config = small(model__init_from="runs/base", model__lora=8)
    assert problems(config) == ("model.lora: expected keys below it, got 8",)


def test_a_key_of_the_section_in_a_wrong_place_is_pointed_there() -> None:
    found = problems(small(model__rank=8))
    assert found == ("model.rank: unknown key; did you mean 'model.lora.rank'?",)


def test_the_schema_names_the_targets() -> None:
    targets = schema()["$defs"]["LoraSection"]["properties"]["targets"]
    assert {"const": "all", "type": "string"} in targets["anyOf"]
    assert targets["default"] == ["qkv", "output", "gate_up", "down"]
