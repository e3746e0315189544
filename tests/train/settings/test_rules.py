"""What fields must satisfy together: each rule with its whole message, and that it can pass."""

from typing import Any

import pytest

from tests.train.runs import problems, small
from train.settings.config import validate
from train.settings.memories import MEMORY_CONFIGS
from train.settings.remedies import nearest_divisors, nearest_multiples
from train.settings.rules import RULES, broken_rules

FAM = {"name": "fam", "slots": 64}


@pytest.mark.parametrize(
    ("changes", "ranks", "line"),
    [
        (
            {"model__num_kv_heads": 3},
            None,
            "model.num_kv_heads: 3 does not divide num_heads = 4 (each key head serves"
            " the same number of query heads); use 2 or 4",
        ),
        (
            {"model__num_kv_heads": 8},
            None,
            "model.num_kv_heads: 8 does not divide num_heads = 4 (each key head serves"
            " the same number of query heads); use 4",
        ),
        (
            {"parallel__tp": 4},
            None,
            "model.num_kv_heads: 2 is not a multiple of parallel.tp = 4; use 4, or lower"
            " parallel.tp",
        ),
        (
            {"model__ffn_size": 129, "parallel__tp": 2},
            None,
            "model.ffn_size: 129 is not a multiple of parallel.tp = 2; use 128 or 130",
        ),
        (
            {
                "parallel__tp": 3,
                "model__num_heads": 6,
                "model__num_kv_heads": 3,
                "model__ffn_size": 129,
                "model__hidden_size": 96,
                "data__segment_len": 96,
                "data__sample_len": 192,
            },
            None,
            "parallel.tp: 3 does not divide 64, which the vocabulary is padded to a multiple of;"
            " use 2 or 4",
        ),
        (
            {"data__packing": True, "model__memory": {"name": "rmt", "slots": 4}},
            None,
            "data.packing: true, but rmt reads whole segments: a document inside a segment would"
            " need memory rows of its own; set data.packing=false, or use none, window, fam,"
            " infini, abc or cmab",
        ),
        (
            {"data__packing": True, "data__shuffle_shards": 4},
            None,
            "data.packing: true, but data.shuffle_shards = 4 reads the index shard by shard, and"
            " packs are made of a whole one; set data.packing=false, or leave shuffle_shards out",
        ),
        (
            {"data__packing": True, "model__memory": {"name": "landmark", "block": 16}},
            None,
            "data.packing: true, but landmark reads whole segments: documents would have to begin"
            " and end with a block; set data.packing=false, or use none, window, fam, infini, abc"
            " or cmab",
        ),
        (
            {"model__head_dim": 15},
            None,
            "model.head_dim: 15 is odd, but rotary embedding turns pairs; use 16",
        ),
        (
            {"model__hidden_size": 62},
            None,
            "model.head_dim: left out, so it is hidden_size / num_heads = 62 / 4, which"
            " is not an even whole number (rotary embedding turns pairs); use hidden_size"
            " 64 or 56 or give head_dim",
        ),
        (
            {"model__hidden_size": 60},
            None,
            "model.head_dim: left out, so it is hidden_size / num_heads = 60 / 4, which"
            " is not an even whole number (rotary embedding turns pairs); use hidden_size"
            " 56 or 64 or give head_dim",
        ),
        (
            {"model__memory": {"name": "fam", "slots": 65}},
            None,
            "model.memory.slots: 65 is more than data.segment_len = 64 (slots take the"
            " last positions of a segment); use at most 64",
        ),
        (
            {"model__memory": {"name": "fam", "slots": 5}, "parallel__tp": 2},
            None,
            "model.memory.slots: 5 is not a multiple of parallel.tp (sequence"
            " parallelism) = 2; use 4 or 6, or set parallel.sequence_parallel=false",
        ),
        (
            {"parallel__cp": 64},
            None,
            "data.segment_len: 64 is not a multiple of 2 * parallel.cp (zigzag: two"
            " chunks a rank) = 128; use 128, or set parallel.layout=contiguous",
        ),
        (
            {"parallel__cp": 3},
            None,
            "data.segment_len: 64 is not a multiple of 2 * parallel.cp (zigzag: two"
            " chunks a rank) = 6; use 66 or 60",
        ),
        (
            {"parallel__cp": 3, "parallel__layout": "contiguous"},
            None,
            "data.segment_len: 64 is not a multiple of parallel.cp = 3; use 63 or 66",
        ),
        (
            {"data__sample_len": 250},
            None,
            "data.sample_len: 250 is not a multiple of data.segment_len = 64; use 256 or 192",
        ),
        (
            {"data__sample_len": 32},
            None,
            "data.sample_len: 32 is not a multiple of data.segment_len = 64; use 64",
        ),
        (
            {"train__bptt_len": 512},
            None,
            "train.bptt_len: 512 is longer than data.sample_len = 256, and gradients"
            " never reach into another sample; use 256 or a longer sample",
        ),
        (
            {"train__bptt_len": 100},
            None,
            "train.bptt_len: 100 is not a multiple of data.segment_len = 64; use 128 or 64",
        ),
        (
            {"train__bptt_len": 192},
            None,
            "train.bptt_len: 192 does not divide data.sample_len = 256; use 128 or 256",
        ),
        (
            {"parallel__cp": 4},
            6,
            "parallel: world size 6 is not tp * cp * dp with tp * cp = 1 * 4 = 4; start 4"
            " or 8 ranks, or change tp or cp",
        ),
        (
            {"parallel__cp": 4},
            1,
            "parallel: world size 1 is not tp * cp * dp with tp * cp = 1 * 4 = 4; start 4"
            " ranks, or change tp or cp",
        ),
        (
            {"train__batch_size": 6, "train__micro_batch": 2},
            4,
            "train.batch_size: 6 is not a multiple of dp * micro_batch = 4 * 2 = 8; use 8",
        ),
        (
            {"train__batch_size": 7, "train__micro_batch": 2},
            None,
            "train.batch_size: 7 is not a multiple of train.micro_batch = 2; use 6 or 8",
        ),
        (
            {
                "data__segment_len": 63,
                "data__sample_len": 63,
                "parallel__tp": 2,
                "parallel__layout": "contiguous",
            },
            2,
            "parallel.sequence_parallel: a call's rows, micro_batch * bptt_len / cp = 1 *"
            " 63 / 1 = 63, do not split over parallel.tp = 2; use data.segment_len 62 or"
            " 64 or set parallel.sequence_parallel=false",
        ),
        (
            {"train__min_lr": 0.01},
            None,
            "train.min_lr: 0.01 is above train.lr = 0.001, where the schedule starts; use"
            " at most 0.001",
        ),
        (
            {"train__warmup_steps": 100},
            None,
            "train.warmup_steps: 100 leaves no step at full rate, train.steps = 100; use"
            " at most 99",
        ),
        (
            {"train__schedule": "wsd"},
            None,
            "train.decay_steps: missing, and schedule=wsd needs it; 10 is a tenth of the run",
        ),
        (
            {"train__schedule": "wsd", "train__decay_steps": 95, "train__warmup_steps": 10},
            None,
            "train.decay_steps: 95 is more than steps - warmup_steps = 100 - 10 = 90; use"
            " at most 90",
        ),
        (
            {"train__curriculum": [{"until": 5, "segments": 1}, {"until": 5, "segments": 2}]},
            None,
            "train.curriculum: a stage until step 5 comes after one until 5; put stages in the"
            " order of their steps, each later than the one before",
        ),
        (
            {"train__curriculum": [{"until": 5, "segments": 4}, {"until": 9, "segments": 5}]},
            None,
            "train.curriculum: the stage until step 9 has 5 segments, but a sample has sample_len"
            " / segment_len = 256 / 64 = 4; use at most 4, or a longer data.sample_len",
        ),
        (
            {"model__lora": {"rank": 65}, "model__init_from": "runs/base"},
            None,
            "model.lora.rank: 65 is more than model.hidden_size = 64, and no weight has a rank"
            " above that; use at most 64, or leave model.lora out to train all weights",
        ),
        (
            {"train__eval_every": 10},
            None,
            "train.eval_every: 10 needs data.valid, which is not set; give a prepared"
            " folder, or use null",
        ),
        (
            {"checkpoint__every": 100, "checkpoint__keep_every": 250},
            None,
            "checkpoint.keep_every: 250 is not a multiple of checkpoint.every = 100; use"
            " 200 or 300",
        ),
    ],
)
def test_a_broken_rule_says_value_limit_and_remedy(
    changes: dict[str, Any], ranks: int | None, line: str
) -> None:
    assert problems(small(**changes), ranks) == (line,)


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({"parallel__tp": 2, "parallel__cp": 2, "model__memory": FAM}, 8),
        ({"parallel__cp": 64, "parallel__layout": "contiguous"}, 64),
        ({"model__hidden_size": 62, "model__head_dim": 16}, None),
        ({"model__lora": {"rank": 64}, "model__init_from": "runs/base"}, None),
        ({"train__bptt_len": 64}, None),
        ({"train__bptt_len": 256}, None),
        ({"train__batch_size": 8, "train__micro_batch": 2}, 4),
        (
            {
                "data__segment_len": 63,
                "data__sample_len": 63,
                "parallel__tp": 2,
                "parallel__layout": "contiguous",
                "parallel__sequence_parallel": False,
                "model__memory": {"name": "fam", "slots": 5},
            },
            2,
        ),
        ({"train__min_lr": 0.001, "train__warmup_steps": 99}, None),
        ({"train__schedule": "wsd", "train__decay_steps": 90, "train__warmup_steps": 10}, None),
        ({"train__eval_every": 10, "data__valid": "shards/valid"}, None),
        ({"checkpoint__every": 100, "checkpoint__keep_every": 300}, None),
        ({"train__curriculum": [{"until": 5, "segments": 4}, {"until": 6, "segments": 1}]}, None),
    ],
)
def test_the_limit_itself_is_valid(changes: dict[str, Any], ranks: int | None) -> None:
    validate(small(**changes), world_size=ranks)


def test_a_rule_is_left_out_while_what_it_reads_is_broken() -> None:
    values = {"model.num_heads": 6, "model.num_kv_heads": 4}
    assert [path for path, _ in broken_rules(values)] == ["model.num_kv_heads"]
    assert broken_rules({"model.num_heads": 6}) == []


def _dotted(values: dict[str, Any], path: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in values.items():
        keys |= _dotted(value, f"{path}{key}.") if isinstance(value, dict) else {path + key}
    return keys


def test_the_fields_that_rules_read_exist() -> None:
    known = {"world_size", "model.memory"}
    for name in MEMORY_CONFIGS:
        optional = {"model__init_from": "runs/base", "model__lora": {"rank": 4}}
        values = validate(small(model__memory=name, **optional)).model_dump()
        memory = values["model"].pop("memory")
        known |= _dotted(values) | _dotted(memory, f"model.memory.{name}.")
    assert {path for rule in RULES for path in rule.needs} <= known


@pytest.mark.parametrize(
    ("value", "of", "text"), [(33, 16, "32 or 48"), (47, 16, "48 or 32"), (3, 16, "16")]
)
def test_the_nearest_multiples_come_nearest_first(value: int, of: int, text: str) -> None:
    assert nearest_multiples(value, of) == text


@pytest.mark.parametrize(
    ("value", "of", "text"), [(3, 8, "2 or 4"), (7, 8, "8 or 4"), (9, 8, "8"), (5, 7, "7 or 1")]
)
def test_the_nearest_divisors_come_nearest_first(value: int, of: int, text: str) -> None:
    assert nearest_divisors(value, of) == text


def test_a_suggestion_for_absurd_numbers_comes_at_once() -> None:
    assert nearest_divisors(7, 10**12) == "8 or 5"
    absurd = small(
        model__memory={"name": "landmark", "block": 7},
        data__segment_len=10**12,
        data__sample_len=10**12,
    )
    assert "; use 8 or 5, or data.segment_len " in problems(absurd)[0]
