"""Configuration: files, overrides, and a resolved form that loads to the same."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.train.runs import ROOT, SMALL, problems, small, write
from train.settings.config import (
    ConfigError,
    Override,
    apply_overrides,
    dump,
    load,
    parse_overrides,
    schema,
    validate,
)
from train.settings.memories import MEMORY_CONFIGS

# overrides


def test_overrides_are_dotted_keys_with_yaml_values() -> None:
    assert parse_overrides(["train.steps=5", "name=a=b", "data.valid=", "a.b=[1, true]"]) == [
        Override(("train", "steps"), 5),
        Override(("name",), "a=b"),
        Override(("data", "valid"), None),
        Override(("a", "b"), [1, True]),
    ]


def test_malformed_overrides_are_all_told() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["train.steps", "=3", "a..b=1", "name={"])
    assert caught.value.problems == (
        "train.steps: not an override; write key=value such as train.steps=50",
        "=3: not an override; write key=value such as train.steps=50",
        "a..b=1: not an override; write key=value such as train.steps=50",
        "name={: the value is not YAML; quote it, as in name='\"...\"'",
    )


def test_the_last_override_wins_and_sections_appear_where_needed(tmp_path: Path) -> None:
    config = load(write(tmp_path, small()), ["parallel.zero=2", "parallel.zero=3"])
    assert config.parallel.zero == 3


def test_an_override_of_the_memorys_name_drops_the_files_keys_of_the_other() -> None:
    raw = small(model__memory={"name": "fam", "slots": 8})
    changed = apply_overrides(raw, parse_overrides(["model.memory.name=none"]))
    assert changed["model"]["memory"] == {"name": "none"}  # type: ignore[index]
    assert raw == small(model__memory={"name": "fam", "slots": 8})


@pytest.mark.parametrize("backwards", [False, True])
def test_overrides_of_the_new_memorys_keys_stay_in_any_order(backwards: bool) -> None:
    raw = small(model__memory={"name": "fam", "slots": 8, "window": 1})
    texts = ["model.memory.name=window", "model.memory.segments=3"]
    overrides = parse_overrides(texts[::-1] if backwards else texts)
    changed = apply_overrides(raw, overrides)
    assert changed["model"]["memory"] == {"name": "window", "segments": 3}  # type: ignore[index]


def test_an_override_with_the_files_own_memory_keeps_its_keys() -> None:
    raw = small(model__memory={"name": "fam", "slots": 8})
    changed = apply_overrides(raw, parse_overrides(["model.memory.name=fam"]))
    assert changed == raw
    unnamed = small(model__memory={"slots": 8})
    changed = apply_overrides(unnamed, parse_overrides(["model.memory.name=fam"]))
    assert changed == raw


@pytest.mark.parametrize("before", ["fam", ["window", "infini"], {"name": "rmt", "slots": 3}])
@pytest.mark.parametrize(
    ("texts", "memory"),
    [
        (["model.memory.name=none"], {"name": "none"}),
        (["model.memory=fam", "model.memory.slots=8"], {"name": "fam", "slots": 8}),
        (["model.memory=[window, infini]"], ["window", "infini"]),
        (
            ["model.memory=[window,infini]", "model.memory.infini.rule=delta"],
            [{"name": "window"}, {"name": "infini", "rule": "delta"}],
        ),
    ],
)
def test_an_override_puts_any_memory_in_the_place_of_any(
    before: object, texts: list[str], memory: object
) -> None:
    changed = apply_overrides(small(model__memory=before), parse_overrides(texts))
    assert changed["model"]["memory"] == memory  # type: ignore[index]


def test_an_override_reaches_a_memory_in_the_files_list_by_name() -> None:
    raw = small(model__memory=[{"name": "window", "segments": 2}, "infini"])
    texts = ["model.memory.infini.rule=delta", "model.memory.window.segments=3"]
    changed = apply_overrides(raw, parse_overrides(texts))
    assert changed["model"]["memory"] == [  # type: ignore[index]
        {"name": "window", "segments": 3},
        {"name": "infini", "rule": "delta"},
    ]


def test_an_override_of_an_unknown_key_is_the_same_problem(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    with pytest.raises(ConfigError) as caught:
        load(path, ["model.hiden_size=4", "train.steps.max=3", "modle.x=1", "steps"])
    assert caught.value.problems == (
        "steps: not an override; write key=value such as train.steps=50",
        "model.hiden_size: unknown key; did you mean 'hidden_size'?",
        "train.steps.max: unknown key; train.steps is a value and has no keys",
        "modle: unknown key; did you mean 'model'?",
    )


def test_the_environment_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, small())
    before = load(path)
    for name in ("SEED", "NAME", "TRAIN__STEPS", "LONGHAUL_SEED", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "7")
    assert load(path) == before


# files


def test_a_header_counts_the_problems_and_each_has_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, small(model__hiden_size=3, train__steps="ten\nor so"))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 2 problems",
        "  model.hiden_size: unknown key; did you mean 'hidden_size'?",
        "  train.steps: expected a whole number, got 'ten\\nor so'",
    ]
    with pytest.raises(ConfigError, match="1 problem\n"):
        load(write(tmp_path, small(**{"two\nlines": 1})))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: [1\ntrain: 3", "line 2, column 6: not YAML: expected ',' or ']', but got ':'"),
        ("- name", "expected keys such as name, model, data, train at the top level"),
        (
            "a: !!python/name:os.system",
            "line 1, column 4: not YAML: could not determine a constructor for the tag"
            " 'tag:yaml.org,2002:python/name:os.system'",
        ),
    ],
)
def test_a_file_that_is_no_configuration_is_told(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert caught.value.problems == (line,)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: \xe9t\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text: byte 6 is 0xe9"):
        load(tmp_path / "latin.yaml")


def test_a_key_that_is_given_twice_is_told_with_the_rest(tmp_path: Path) -> None:
    raw = small(model__num_layers=0, seed=1)
    text = yaml.safe_dump(raw, sort_keys=False) + "seed: 3\nname: other\n"
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert caught.value.problems == (
        "line 17: 'seed' is given twice in one section, first in line 16; keep one",
        "line 18: 'name' is given twice in one section, first in line 1; keep one",
        "model.num_layers: 0 is too small; the least is 1",
    )


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, small(parallel=None, checkpoint=None, model__memory=None))
    assert load(path) == validate(SMALL)


def test_the_run_folder_follows_the_name() -> None:
    assert validate(small(name="a")).run_dir == Path("runs/a")
    assert validate(small(name="a", run_dir="/scratch/a")).run_dir == Path("/scratch/a")
    # a broken name is one problem, and the folder that would follow from it is none
    assert len(problems(small(name=""))) == 1


def test_a_configuration_is_frozen_and_says_how_many_segments() -> None:
    config = validate(small(train__bptt_len=128))
    assert (config.num_segments, config.bptt_segments) == (4, 2)
    assert validate(SMALL).bptt_segments == 4
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3


@pytest.mark.parametrize(
    ("file", "ranks"), [("quickstart", 4), ("books", 8), ("pretrain_8b", 64), ("finetune_lora", 8)]
)
def test_the_configurations_of_the_repository_are_valid(file: str, ranks: int) -> None:
    load(ROOT / "configs" / f"{file}.yaml", world_size=ranks)


# dump and schema


def _differ(parts: list[Any]) -> bool:
    """Return whether no memory is named twice, and one at most sets a window."""
    names = [part if isinstance(part, str) else part["name"] for part in parts]
    windows = [part for part in parts if isinstance(part, dict) and part.get("window")]
    return len(set(names)) == len(names) and not windows


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Valid raw configurations, most fields drawn."""
    segment = draw(st.integers(1, 8)) * 64
    segments = draw(st.integers(1, 8))
    small_float = st.floats(1e-9, 0.9)
    fam = st.fixed_dictionaries(
        {"name": st.just("fam")},
        optional={
            "slots": st.integers(1, 64),
            "window": st.integers(0, 9),
            "state": st.sampled_from(["paper", "norm", "latch"]),
            "random_state_passing": st.floats(0, 1),
        },
    )
    infini = st.fixed_dictionaries(
        {"name": st.just("infini")},
        optional={"rule": st.sampled_from(["linear", "delta"]), "gate_init": st.floats(-9, 9)},
    )
    one = st.sampled_from(sorted(MEMORY_CONFIGS)) | fam | infini
    some = st.lists(infini | fam | st.just("cmab"), max_size=3, unique_by=str)
    several = some.map(lambda parts: ["window", *parts]).filter(_differ)
    memory = one | several | st.just({"name": "window", "segments": 3})
    # what YAML could take for something else
    tricky = st.text("aé0.:/#-'\"{}[]%&*!|> \t\n~=<\\", min_size=1, max_size=12)
    name = st.text("aeNy019._-", min_size=1, max_size=8).map(lambda text: "0" + text)
    return small(
        name=draw(name),
        run_dir=draw(tricky),
        seed=draw(st.integers(0, 2**63)),
        model__memory=draw(memory),
        model__norm_eps=draw(small_float),
        model__vocab_size=draw(st.none() | st.integers(1, 2**20)),
        data__segment_len=segment,
        data__sample_len=segment * segments,
        data__valid=draw(st.none() | st.just("shards/valid")),
        parallel__timeout_s=draw(st.floats(1e-3, 1e9)),
        train__bptt_len=draw(st.none() | st.just(segment)),
        train__lr=draw(small_float),
        train__checkpointing=draw(st.sampled_from(["none", "selective", "block"])),
        tracking__uri=draw(st.none() | tricky),
    )


@settings(max_examples=30, deadline=None)  # a busy box is slow, not wrong
@given(raw=configurations())
def test_a_dumped_configuration_loads_to_the_same(raw: dict[str, Any]) -> None:
    config = validate(copy.deepcopy(raw))
    assert validate(yaml.safe_load(dump(config))) == config


def test_a_dumped_file_loads_to_the_same(tmp_path: Path) -> None:
    config = load(write(tmp_path, small()), ["train.lr=3e-5", "data.valid=v"], world_size=2)
    text = dump(config)
    assert load(write(tmp_path, text)) == config
    assert dump(load(write(tmp_path, text))) == text


def _sections() -> list[dict[str, Any]]:
    return [part for part in schema()["$defs"].values() if part["type"] == "object"]


def _fields(schema_: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    sections = [schema_, *_sections()]
    return [item for section in sections for item in section["properties"].items()]


def test_every_field_is_described() -> None:
    assert [name for name, field in _fields(schema()) if len(field["description"]) < 15] == []


def test_the_schema_allows_units_and_gives_limits() -> None:
    definitions = schema()["$defs"]
    length = definitions["DataSection"]["properties"]["segment_len"]
    assert {kind["type"] for kind in length["anyOf"]} == {"integer", "string"}
    assert definitions["CheckpointSection"]["properties"]["every"]["minimum"] == 1
    assert definitions["TrainSection"]["properties"]["lr"]["exclusiveMinimum"] == 0
    assert all(section["additionalProperties"] is False for section in _sections())


def test_the_schema_names_each_memory() -> None:
    memory = schema()["$defs"]["ModelSection"]["properties"]["memory"]
    keys, names, several = memory["anyOf"]
    known = set(MEMORY_CONFIGS)
    assert set(keys["discriminator"]["mapping"]) == set(names["enum"]) == known
    (item_keys, item_names) = schema()["$defs"][several["$ref"].rpartition("/")[2]]["items"][
        "anyOf"
    ]
    assert (item_keys, item_names) == (keys, names)
