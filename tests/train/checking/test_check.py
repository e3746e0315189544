"""`longhaul check`: what is shrunk and what stays, the search, and what is compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.train.runs import longhaul
from train.checking.batches import make_batches
from train.checking.compare import FLOORS
from train.checking.shrink import MOST, changes, flatten, shrink, shrink_layout
from train.checking.switches import Switch, smallest, switches_of, with_only
from train.settings.config import Config, load, validate
from train.settings.memories import MEMORY_CONFIGS

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SIZES = {
    *("vocab_size", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim"),
    *("ffn_size", "init_std", "sliding_window", "init_from", "rank", "alpha", *MOST),
    *("segment_len", "sample_len", "tp", "cp", "timeout_s", "steps", "batch_size", "micro_batch"),
    *("bptt_len", "loss_chunk", "ffn_chunk", "lr", "min_lr", "warmup_steps", "decay_steps"),
    *("eps", "clip", "compile", "random_state_passing", "until", "segments"),
}
"""What shrinking may change; all else is a switch."""


def cluster(memory: object, **more: object) -> Config:
    """Return a configuration of many ranks with as many switches as the memory allows."""
    named: Any = memory[0] if isinstance(memory, list) else memory
    raw: dict[str, Any] = {
        "name": "cluster",
        "model": {
            "num_layers": 40, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8,
            "ffn_size": 14336, "memory": memory, "qkv_bias": True, "rope_base": 5e5,
            "lora": {"rank": 64, "alpha": 32.0, "targets": ["qkv", "down"]},
        },
        "data": {"train": "shards", "segment_len": "16k", "sample_len": "128k"},
        "parallel": {"tp": 8, "cp": 4, "zero": 2},
        "train": {
            "steps": 10000, "batch_size": 64, "micro_batch": 8, "bptt_len": "64k", "lr": 3e-4,
            "warmup_steps": 500, "precision": "bf16", "checkpointing": "block", "loss_chunk": "4k",
            "schedule": "wsd", "decay_steps": 1000,
            "curriculum": [{"until": 100, "segments": 2}],
        },
    }  # fmt: skip
    raw["data"]["packing"] = named["name"] in ("none", "window", "fam", "infini", "abc", "cmab")
    for key, value in more.items():
        section, name = key.split("__")
        raw[section][name] = value
    return validate(raw)


MEMORIES = [{"name": name} for name in MEMORY_CONFIGS] + [
    [{"name": "window"}, {"name": "fam", "state": "latch"}, {"name": "abc"}]
]


@pytest.mark.parametrize("most_ranks", [4, 8])
@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_shrinking_changes_sizes_and_no_switch(memory: object, most_ranks: int) -> None:
    config = cluster(memory)
    subject = shrink(config, most_ranks)
    changed = {key.split(".")[-1] for key, _, _ in changes(config, subject)}
    assert changed <= SIZES
    was, now = (flatten(c.model_dump(mode="json")) for c in (config, subject.config))
    assert was.keys() == now.keys()
    small = subject.config
    assert small.num_segments // small.bptt_segments == 2 and small.bptt_segments == 2
    assert small.train.batch_size == 2 * subject.dp * small.train.micro_batch


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_shrinks(path: Path) -> None:
    subject = shrink(load(path), 4)
    assert 2 <= subject.ranks <= 4
    assert [batch.tokens.shape[2] for batch in make_batches(subject.config)] == [16, 16, 16]


@pytest.mark.parametrize(
    ("tp", "cp", "most_ranks", "expected"),
    [
        (8, 4, 4, (2, 2, 1)),
        (8, 4, 8, (2, 2, 2)),
        (8, 4, 16, (2, 4, 2)),
        (1, 8, 4, (1, 2, 2)),
        (1, 1, 4, (1, 1, 2)),
        (2, 1, 4, (2, 1, 2)),
        (1, 4, 2, (1, 2, 1)),
    ],
)
def test_each_kind_of_parallelism_keeps_two_ranks(
    tp: int, cp: int, most_ranks: int, expected: tuple[int, int, int]
) -> None:
    config = cluster({"name": "none"}, parallel__tp=tp, parallel__cp=cp)
    assert shrink_layout(config, most_ranks) == expected


def test_too_few_ranks_are_refused_with_the_number_needed() -> None:
    with pytest.raises(ValueError, match=r"--ranks 2 cannot .*tp=8 .*cp=4 .*use --ranks 4"):
        shrink(cluster({"name": "none"}), 2)


def test_one_lane_has_no_data_parallel_ranks() -> None:
    config = cluster({"name": "none"}, train__batch_size=8, train__micro_batch=8)
    assert shrink(config, 8).dp == 1


# the search


def letters(*names: str) -> list[Switch]:
    return [Switch(name, 1, 0) for name in names]


@pytest.mark.parametrize("culprits", ["", "a", "h", "dg", "ab", "acf"])
def test_the_smallest_set_that_breaks_is_found_in_few_calls(culprits: str) -> None:
    calls = []

    def breaks(on: Sequence[Switch]) -> bool:
        calls.append(on)
        return set(culprits) <= {switch.key for switch in on}

    found = smallest(letters(*"abcdefgh"), breaks)
    assert {switch.key for switch in found} == set(culprits)
    assert len(calls) <= 1 + 6 * len(culprits)


def test_where_two_switches_break_alone_one_is_found() -> None:
    found = smallest(letters(*"abcd"), lambda on: bool({"b", "d"} & {s.key for s in on}))
    assert [switch.key for switch in found] in (["b"], ["d"])


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_with_every_switch_off_it_is_one_plain_process(memory: object) -> None:
    subject = shrink(cluster(memory), 8)
    every = switches_of(subject)
    off = with_only(subject, [], every)
    assert off is not None
    assert off.ranks == 1
    config = off.config
    assert config.model.memory.name == "none" and config.model.lora is None
    assert (config.train.precision, config.train.checkpointing) == ("fp32", "none")
    assert (config.num_segments, config.bptt_segments) == (1, 1)
    assert not config.data.packing and not config.train.curriculum
    assert with_only(subject, every, every) == subject


def test_a_switch_that_others_need_stays() -> None:
    """hmt summarises a segment's first half, which contiguous slices do not hold evenly."""
    keys = {s.key for s in switches_of(shrink(cluster({"name": "hmt"}), 4))}
    assert "parallel.layout" not in keys
    assert {"parallel.cp", "parallel.attention", "model.memory.hmt"} <= keys


# the command


def test_bad_input_is_told_before_anything_starts(tmp_path: Path) -> None:
    quickstart = str(ROOT / "configs/quickstart.yaml")
    for words, message in [
        (["nowhere.yaml"], "cannot be read"),
        ([quickstart, "parallel.cpp=2"], "did you mean 'cp'"),
        ([quickstart, "--ranks", "2"], "use --ranks 4 or more"),
    ]:
        done = longhaul("check", *words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.gloo
def test_a_sound_layout_passes_and_is_told_as_json() -> None:
    done = longhaul(
        "check", str(ROOT / "configs/quickstart.yaml"), "parallel.tp=1", "--ranks", "2", "--json"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["equal"] and told["switches"] is None
    assert told["shrunk"]["model.hidden_size"] == [128, 32]
    (comparison,) = told["comparisons"]
    assert comparison["ranks"] == 2
    kinds = {each["kind"] for each in comparison["differences"]}
    assert kinds == {*FLOORS, "exchange"}
    assert all(each["passes"] for each in comparison["differences"] + told["one_process"])
    assert "2 processes" in done.stderr
