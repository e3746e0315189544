"""`longhaul check`: what is shrunk and what stays, the search, and what is compared."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.mutations import config_of
from tests.train.runs import longhaul
from train.build import to_model_config
from train.checking import plain
from train.checking.batches import make_batches
from train.checking.check import Comparison, Report
from train.checking.compare import FLOORS, compare
from train.checking.plain import Step, Trained, begin
from train.checking.report import as_json, as_text, worst_of
from train.checking.shrink import MOST, Subject, changes, flatten, shrink, shrink_layout
from train.checking.switches import Switch, smallest, switches_of, with_only
from train.settings.config import Config, load, validate
from train.settings.memories import MEMORY_CONFIGS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SIZES = {
    *("vocab_size", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim"),
    *("ffn_size", "init_std", "sliding_window", "init_from", "rank", "alpha", *MOST),
    *("segment_len", "sample_len", "tp", "cp", "timeout_s", "steps", "batch_size", "micro_batch"),
    *("bptt_len", "loss_chunk", "ffn_chunk", "lr", "min_lr", "warmup_steps", "decay_steps"),
    *("eps", "clip", "random_state_passing", "until", "segments"),
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


# the comparison


def trained(subject: Subject, dtype: torch.dtype) -> Trained:
    return plain.train(subject.config, model_of(subject), dtype)


def model_of(subject: Subject) -> Any:
    return to_model_config(subject.config, 0)


SUBJECT = shrink(config_of({"data.sample_len": 256, "model.memory": {"name": "fam"}}), 1)


@functools.cache
def exact() -> Trained:
    return trained(SUBJECT, torch.float64)


@functools.cache
def rounded() -> Trained:
    return trained(SUBJECT, torch.float32)


def spoilt(name: str, change: Any) -> Trained:
    """Return what one process rounds, with one gradient of the second step changed."""
    steps = list(rounded().steps)
    gradients = dict(steps[1].gradients)
    gradients[name] = change(gradients[name].clone())
    steps[1] = Step(steps[1].loss, steps[1].grad_norm, gradients)
    return Trained(steps, rounded().weights)


def off(found: Trained) -> list[str]:
    some = compare(found, exact(), rounded(), model_of(SUBJECT))
    return [each.describe() for each in some if not each.passes]


def test_rounding_passes() -> None:
    assert off(rounded()) == []


def test_every_parameter_is_compared_and_queries_keys_and_values_apart() -> None:
    some = compare(rounded(), exact(), rounded(), model_of(SUBJECT))
    names = {each.name for each in some if each.kind == "gradient"}
    parts = {f"blocks.0.qkv.linear.weight ({part})" for part in "qkv"}
    assert parts <= names
    assert {name.split(" ")[0] for name in names} == set(exact().weights)
    assert {each.kind for each in some} == set(FLOORS)


def test_a_wrong_key_gradient_is_named_with_its_layer_and_step() -> None:
    def spoil(x: torch.Tensor) -> torch.Tensor:
        x[8:16] *= 1.001  # of the first head's group [q, k, v]
        return x

    assert off(spoilt("blocks.1.qkv.linear.weight", spoil)) == [
        "gradient of blocks.1.qkv.linear.weight (k) (layer 1), step 2"
    ]


def test_not_a_number_is_out_of_tolerance() -> None:
    found = off(spoilt("head.norm.weight", lambda x: x * float("nan")))
    assert found == ["gradient of head.norm.weight, step 2"]


def test_one_of_several_replicas_is_enough() -> None:
    def replicas(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x * 1.01])

    assert off(spoilt("head.norm.weight", replicas)) == ["gradient of head.norm.weight, step 2"]


def test_tolerances_are_those_of_float32_where_one_process_rounds_no_more() -> None:
    some = compare(exact(), exact(), exact(), model_of(SUBJECT))
    assert {each.tolerance for each in some} == set(FLOORS.values())


def test_the_references_optimizer_is_adamw() -> None:
    config, model_config = SUBJECT.config, model_of(SUBJECT)
    model = begin(config, model_config, torch.float64)
    parameters = dict(model.named_parameters())
    decayed = [p for p in parameters.values() if p.dim() > 1]
    rest = [p for p in parameters.values() if p.dim() <= 1]
    own = config.train
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": own.weight_decay}, {"params": rest}],
        lr=1.0, betas=(own.beta1, own.beta2), eps=own.eps, weight_decay=0.0,
    )  # fmt: skip
    for number, step in enumerate(exact().steps):
        for name, p in parameters.items():
            p.grad = step.gradients[name].clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), own.clip)
        for group in optimizer.param_groups:
            group["lr"] = plain.learning_rate(own, number)
        optimizer.step()
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), exact().weights[name], rtol=1e-12, atol=1e-12)


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


def test_a_report_names_what_is_off_and_what_breaks_it() -> None:
    found = compare(
        spoilt("head.norm.weight", lambda x: 2 * x), exact(), rounded(), model_of(SUBJECT)
    )
    comparison = Comparison(SUBJECT, found)
    report = Report(
        SUBJECT.config, [], [comparison], [Switch("parallel.cp", 2, 1), Switch("dp", 2, 1)], 1.0
    )
    worst = worst_of(report)
    assert worst is not None and worst.name == "head.norm.weight"
    text = as_text(report)
    assert "NOT EQUAL" in text and "gradient of head.norm.weight, step 2" in text
    assert "what breaks it: parallel.cp=2 with dp=2 (without any one of them it is equal)" in text
    assert as_json(report)["switches"] == ["parallel.cp=2", "dp=2"]
