"""Every bad input: one line, before any rank waits for another."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpora import write_numbers
from tests.ranks import run_ranks
from tests.train.runs import longhaul, write
from tests.train.tiny import FAM, Shards, build_tiny, prepare_shards, tiny, tiny_config
from train.checkpoints.folder import list_checkpoints, read_manifest
from train.loop import TrainState
from train.settings.config import ConfigError, validate
from train.starting.inputs import checkpoint_problems, open_inputs
from train.starting.resume import RunFolder


def lines(raw: dict[str, Any], *, fresh: bool = False) -> tuple[str, ...]:
    """Return the problems that open_inputs finds; none is an error."""
    with pytest.raises(ConfigError) as caught:
        open_inputs(validate(raw), fresh=fresh)
    return caught.value.problems


def one_line(raw: dict[str, Any]) -> str:
    """Return the only problem, which is one line."""
    (line,) = lines(raw)
    assert "\n" not in line
    return line


def assert_says(line: str, *parts: object) -> None:
    assert [part for part in map(str, parts) if part not in line] == [], line


# data


def test_good_inputs_are_opened(tmp_path: Path, shards: Shards) -> None:
    inputs = open_inputs(validate(tiny(tmp_path / "run", shards)))
    assert inputs.train.folder == shards.train
    assert inputs.valid is not None and inputs.valid.folder == shards.valid


@pytest.mark.parametrize("field", ["train", "valid"])
def test_missing_shards(field: str, tmp_path: Path, shards: Shards) -> None:
    missing = tmp_path / "nowhere"
    line = one_line(tiny(tmp_path / "run", shards, **{f"data__{field}": str(missing)}))
    assert line.startswith(f"data.{field}: ")
    assert_says(line, missing, "does not exist", "longhaul prepare")


def test_a_foreign_folder(tmp_path: Path, shards: Shards) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").touch()
    line = one_line(tiny(tmp_path / "run", shards, data__train=str(tmp_path / "photos")))
    assert_says(line, "data.train: ", tmp_path / "photos", "longhaul prepare")


def copy(shards: Shards, folder: Path) -> Path:
    shutil.copytree(shards.train, folder)
    return folder


def cut_shard(folder: Path) -> str:
    shard = next(folder.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    return shard.name


def lose_shard(folder: Path) -> str:
    shard = next(folder.glob("*.tar"))
    shard.unlink()
    return shard.name


def spoil_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text("{")
    return "manifest.json"


@pytest.mark.parametrize("damage", [cut_shard, lose_shard, spoil_manifest])
def test_a_damaged_shard(damage: Callable[[Path], str], tmp_path: Path, shards: Shards) -> None:
    folder = copy(shards, tmp_path / "shards")
    name = damage(folder)
    line = one_line(tiny(tmp_path / "run", shards, data__train=str(folder)))
    assert_says(line, "data.train: ", folder, name)


def test_another_tokenizer_in_valid(tmp_path: Path, shards: Shards) -> None:
    write_numbers(tmp_path / "numbers", [40, 40], vocab_size=100)
    line = one_line(tiny(tmp_path / "run", shards, data__valid=str(tmp_path / "numbers")))
    assert_says(
        line, "data.valid: ", tmp_path / "numbers", shards.train, "another tokenizer", "prepare"
    )


def test_a_vocabulary_that_is_too_small(tmp_path: Path, shards: Shards) -> None:
    line = one_line(tiny(tmp_path / "run", shards, model__vocab_size=100))
    assert_says(line, "model.vocab_size: 100", "257", "use 257 or leave it out")


def test_all_problems_are_told_at_once(tmp_path: Path, shards: Shards) -> None:
    changes = {"data__valid": str(tmp_path / "nowhere"), "model__vocab_size": 5}
    found = lines(tiny(tmp_path / "run", shards, **changes))
    assert [line.split(":")[0] for line in found] == ["data.valid", "model.vocab_size"]


# a checkpoint of something else


def save_once(raw: dict[str, Any]) -> None:
    config = validate(raw)
    built, mesh, inputs = build_tiny(config)
    RunFolder(config, built, mesh, inputs.train).save_now(TrainState(step=3))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Shards) -> Path:
    """Return the folder of a run of two ranks with a checkpoint; nothing may write there."""
    folder: Path = tmp_path_factory.mktemp("run")
    run_ranks(2, save_once, tiny(folder, shards))
    return folder


OTHER = [
    ("model.num_layers", "model__num_layers", 3, 2),
    ("model.num_kv_heads", "model__num_kv_heads", 4, 2),
    ("model.tie_embeddings", "model__tie_embeddings", True, False),
    ("model.memory.slots", "model__memory__slots", 8, 4),
    ("data.segment_len", "data__segment_len", 32, 16),
    ("data.sample_len", "data__sample_len", 128, 64),
    ("data.packing", "data__packing", True, False),
    ("train.batch_size", "train__batch_size", 8, 4),
    ("seed", "seed", 5, 0),
]


@pytest.mark.parametrize(("field", "key", "now", "before"), OTHER, ids=[case[0] for case in OTHER])
def test_a_checkpoint_of_another_run_names_field_values_and_remedy(
    field: str, key: str, now: object, before: object, run: Path, shards: Shards
) -> None:
    line = one_line(tiny(run, shards, **{key: now}))
    assert line.startswith(f"{field}: {now}, ")
    assert_says(line, f"with {before}", "set it back", "--fork NAME")


def test_another_memory_is_one_problem(run: Path, shards: Shards) -> None:
    line = one_line(tiny(run, shards, model__memory={"name": "window"}))
    assert line.startswith("model.memory.name: window, ")
    assert_says(line, "with fam", "--fork NAME")


def test_a_checkpoint_from_before_packing_was_not_packed(run: Path, shards: Shards) -> None:
    (path,) = list_checkpoints(run / "checkpoints")
    manifest = read_manifest(path)
    del manifest.config["data"]["packing"]
    config = validate(tiny(run, shards))
    assert checkpoint_problems(config, manifest) == []


def compare(memory: object, before: object, run: Path, shards: Shards) -> list[tuple[str, str]]:
    """Return the problems of going on with a memory from a checkpoint with another."""
    (path,) = list_checkpoints(run / "checkpoints")
    then = validate(tiny(run, shards, model__memory=before)).model_dump(mode="json")
    manifest = dataclasses.replace(read_manifest(path), config=json.loads(json.dumps(then)))
    return checkpoint_problems(validate(tiny(run, shards, model__memory=memory)), manifest)


HMT = {"name": "hmt", "sensory": 4}
SEVERAL = ["window", {"name": "infini", "rule": "delta"}]


def test_several_memories_are_compared_key_by_key(run: Path, shards: Shards) -> None:
    assert compare(SEVERAL, SEVERAL, run, shards) == []
    ((field, text),) = compare(["window", "infini"], SEVERAL, run, shards)
    assert field == "model.memory.infini.rule"
    assert_says(text, "linear, but", "trained with delta", "set it back")


@pytest.mark.parametrize(
    ("now", "before"), [(FAM, SEVERAL), (SEVERAL, FAM), (SEVERAL, ["window", "abc"])]
)
def test_other_memories_are_one_problem(
    now: object, before: object, run: Path, shards: Shards
) -> None:
    ((field, text),) = compare(now, before, run, shards)
    names = ["fam" if memory == FAM else "window + " for memory in (now, before)]
    assert field == "model.memory.name"
    assert_says(text, f"{names[0]}", f"trained with {names[1]}")


@pytest.mark.parametrize(
    ("now", "before"),
    [
        ({"name": "infini", "gate_lr": 3}, "infini"),
        ({**HMT, "search_from": 9}, HMT),
        (["window", {"name": "fam", "slots": 4, "random_state_passing": 0.5}],
         ["window", {"name": "fam", "slots": 4}]),
    ],
)  # fmt: skip
def test_what_concerns_a_memorys_training_alone_may_change(
    now: object, before: object, run: Path, shards: Shards
) -> None:
    assert compare(now, before, run, shards) == []


def test_a_checkpoint_of_other_data(run: Path, tmp_path: Path) -> None:
    other = prepare_shards(tmp_path, seed=1)
    line = one_line(tiny(run, other))
    assert_says(line, "data.train: ", other.train, "is not what run", run, "--fork NAME")


FREELY = {
    "name": "renamed",
    "train__steps": 99,
    "train__micro_batch": 2,
    "train__lr": 0.5,
    "train__bptt_len": 16,
    "train__eval_tokens": 512,
    "checkpoint__every": 1,
    "data__workers": 2,
    "model__memory": {**FAM, "random_state_passing": 0.5},
    "parallel__sequence_parallel": False,
    "parallel__attention": "all_gather",
    "parallel__tp": 2,
    "parallel__cp": 2,
    "parallel__zero": 3,
    "parallel__layout": "contiguous",
}


@pytest.mark.parametrize("key", FREELY)
def test_what_may_change_in_a_run_may(key: str, run: Path, shards: Shards) -> None:
    open_inputs(validate(tiny(run, shards, **{key: FREELY[key]})))


def test_the_same_data_in_another_place_will_do(run: Path, tmp_path: Path, shards: Shards) -> None:
    folder = copy(shards, tmp_path / "moved")
    open_inputs(validate(tiny(run, shards, data__train=str(folder))))


def test_to_begin_again_the_old_checkpoints_do_not_matter(run: Path, shards: Shards) -> None:
    open_inputs(validate(tiny(run, shards, model__num_layers=3)), fresh=True)


def test_an_unreadable_newest_manifest_is_passed_over(
    run: Path, tmp_path: Path, shards: Shards
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    newer = folder / "checkpoints/step-00000009"
    newer.mkdir()
    (newer / "manifest.json").write_text("{")
    line = one_line(tiny(folder, shards, seed=1))
    assert line.startswith("seed: 1")


def test_a_key_that_an_older_version_did_not_have_counts_as_its_default(
    run: Path, shards: Shards
) -> None:
    (path,) = list_checkpoints(run / "checkpoints")
    manifest = read_manifest(path)
    saved = json.loads(json.dumps(manifest.config))
    del saved["model"]["rope_base"]
    older = dataclasses.replace(manifest, config=saved)
    assert checkpoint_problems(validate(tiny(run, shards)), older) == []
    ((field, text),) = checkpoint_problems(validate(tiny(run, shards, model__rope_base=5)), older)
    assert field == "model.rope_base"
    assert_says(text, "5.0", "with 10000.0")


def test_a_value_that_is_only_spelled_out_is_no_change(run: Path, shards: Shards) -> None:
    spelled = {"model__vocab_size": 257, "model__head_dim": 8, "train__bptt_len": 64}
    open_inputs(validate(tiny(run, shards, **spelled)))


def test_another_vocabulary_than_the_datas_is_a_change(run: Path, shards: Shards) -> None:
    line = one_line(tiny(run, shards, model__vocab_size=300))
    assert line.startswith("model.vocab_size: 300, ")
    assert_says(line, "with 257")


def test_a_checkpoint_of_a_newer_version_is_not_passed_over_in_silence(
    run: Path, tmp_path: Path, shards: Shards
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    newer = folder / "checkpoints/step-00000009"
    newer.mkdir()
    (newer / "manifest.json").write_text('{"format": 99}')
    line = one_line(tiny(folder, shards))
    assert_says(line, "checkpoint: ", newer, "format 99", "update longhaul")
    open_inputs(validate(tiny(folder, shards)), fresh=True)


def test_a_run_folder_that_cannot_be_written(
    tmp_path: Path, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    # (the super-user may write into every folder, so its permissions would not do)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    line = one_line(tiny(tmp_path / "runs/run", shards))
    assert_says(line, "run_dir: ", tmp_path, "read-only", "another run_dir")


def test_a_run_folder_that_is_a_file(tmp_path: Path, shards: Shards) -> None:
    (tmp_path / "run").touch()
    assert_says(one_line(tiny(tmp_path / "run", shards)), "run_dir: ", "is no folder")


# through the command line


def start(folder: Path, raw: dict[str, Any], rank: int) -> Any:
    """Start one of two ranks; its peer does not exist, so waiting for it would take a minute."""
    nowhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": str(rank)}
    file = write(folder, raw)
    return longhaul("pretrain", file, RANK=str(rank), WORLD_SIZE="2", **nowhere)


def test_problems_of_inputs_end_with_code_2_and_no_traceback_before_ranks_meet(
    run: Path, tmp_path: Path, shards: Shards
) -> None:
    changes = {"data__valid": str(tmp_path / "nowhere"), "train__batch_size": 8}
    ended = start(tmp_path, tiny(run, shards, **changes), rank=0)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    errors = ended.stderr.strip().splitlines()
    assert errors[0].endswith("2 problems")
    assert [line.strip().split(":")[0] for line in errors[1:]] == [
        "data.valid",
        "train.batch_size",
    ]


def test_the_other_ranks_end_alike_and_say_nothing(
    run: Path, tmp_path: Path, shards: Shards
) -> None:
    ended = start(tmp_path, tiny(run, shards, train__batch_size=8), rank=1)
    assert ended.returncode == 2
    assert ended.stderr == ""


def test_a_memory_that_chooses_by_later_tokens_is_not_trained(shards: Shards) -> None:
    memory = {"name": "landmark", "block": 4, "retrieve": 2, "granularity": "tokens"}
    for spelled in (memory, [{"name": "window", "segments": 1}, memory]):
        with pytest.raises(ConfigError, match="the loss would see its own future"):
            open_inputs(tiny_config(shards, model__memory=spelled))
