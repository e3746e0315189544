"""Each wrong field is one line with its limit or the nearest thing that exists, all at once."""

import pytest

from tests.train.runs import problems, small
from train.settings.config import validate


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        (
            "name",
            "a b",
            "name: 'a b' is not a name; use letters, digits, '.', '_' and '-', and begin"
            " with a letter or digit",
        ),
        ("name", 8, "name: expected text, got 8; write it in quotes if it is meant as text"),
        ("seed", -1, "seed: -1 is too small; the least is 0"),
        ("model__num_layers", True, "model.num_layers: expected a whole number, got true"),
        ("model__num_layers", 0, "model.num_layers: 0 is too small; the least is 1"),
        ("model__rope_base", 0, "model.rope_base: 0 is too small; it must be above 0"),
        ("model__tie_embeddings", 3, "model.tie_embeddings: expected true or false, got 3"),
        ("data__train", None, "data.train: expected a path, got null"),
        (
            "data__segment_len",
            "1kb",
            "data.segment_len: expected a number of tokens such as 8192, 32k (32768) or"
            " 1M (1048576), got '1kb'",
        ),
        (
            "data__on_damage",
            "stpo",
            "data.on_damage: 'stpo' is not one of stop, skip; did you mean 'stop'?",
        ),
        ("parallel__zero", 4, "parallel.zero: 4 is not one of 1, 2, 3"),
        (
            "parallel__timeout_s",
            "30m",
            "parallel.timeout_s: expected a duration such as 90s, 30min, 1h30min or"
            " seconds, got '30m'",
        ),
        ("train__lr", "fast", "train.lr: expected a number such as 0.1 or 3e-4, got 'fast'"),
        ("train__lr", 0, "train.lr: 0 is too small; it must be above 0"),
        ("train__beta2", 1, "train.beta2: 1 is too large; it must be below 1"),
        (
            "train__clip",
            {"norm": 1},
            "train.clip.norm: unknown key; train.clip is a value and has no keys",
        ),
        ("checkpoint__keep", 1, "checkpoint.keep: 1 is too small; the least is 2"),
        ("checkpoint", 3, "checkpoint: expected keys below it, got 3"),
        (
            "tracking__experiment",
            "",
            "tracking.experiment: '' is empty; leave it out or give a value",
        ),
    ],
)
def test_a_wrong_value_is_told_with_its_limit(key: str, value: object, line: str) -> None:
    assert problems(small(**{key: value})) == (line,)


def test_a_missing_field_is_told_with_what_it_is_for() -> None:
    raw = small()
    del raw["model"]["num_layers"], raw["data"]
    assert problems(raw) == (
        "model.num_layers: missing; decoder blocks, one after the other",
        "data.train: missing; folder of prepared training shards (`longhaul prepare` writes it)",
        "data.segment_len: missing; tokens (S) in a segment",
        "data.sample_len: missing; tokens of a stream that one optimizer step consumes",
    )


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("model__hiden_size", "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ("model__steps", "model.steps: unknown key; did you mean 'train.steps'?"),
        ("lr", "lr: unknown key; did you mean 'train.lr'?"),
        ("trian", "trian: unknown key; did you mean 'train'?"),
        ("model__slots", "model.slots: unknown key; did you mean 'model.memory.slots'?"),
        ("model__block", "model.block: unknown key; did you mean 'model.memory.block'?"),
        (
            "checkpoint__xyz",
            "checkpoint.xyz: unknown key; known here: every, keep, keep_every, asynchronous,"
            " max_failures",
        ),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_known_one(key: str, line: str) -> None:
    assert problems(small(**{key: 1})) == (line,)


def test_a_memory_is_chosen_by_name() -> None:
    fam = validate(small(model__memory={"name": "fam", "slots": 8})).model.memory
    assert fam.model_dump() == {
        "name": "fam",
        "slots": 8,
        "window": 0,
        "state": "norm",
        "beta": 2.0,
        "query_position": "current",
        "first": "prompt",
        "random_state_passing": 0.0,
    }
    window = validate(small(model__memory={"name": "window"})).model.memory
    assert window.model_dump() == {"name": "window", "segments": 1}
    assert validate(small(model__memory="window")).model.memory == window
    assert validate(small()).model.memory.name == "none"


def test_memories_in_a_list_are_chosen_by_name() -> None:
    memory = ["window", {"name": "infini", "rule": "delta"}]
    found = validate(small(model__memory=memory)).model.memory
    assert found.name == "window + infini"
    assert found.model_dump() == (  # type: ignore[comparison-overlap]
        {"name": "window", "segments": 1},
        {"name": "infini", "rule": "delta", "gate_init": 0.0, "gate_lr": 10.0, "window": 0},
    )


NAMES = "none, window, fam, infini, abc, cmab, rmt, armt, hmt, landmark"


@pytest.mark.parametrize(
    ("memory", "line"),
    [
        (
            {"name": "fan"},
            f"model.memory.name: 'fan' is not one of {NAMES}; did you mean 'fam'?",
        ),
        ("fan", f"model.memory.name: 'fan' is not one of {NAMES}; did you mean 'fam'?"),
        ({"name": None}, f"model.memory.name: null is not one of {NAMES}"),
        ({"slots": 4}, f"model.memory.name: missing; one of {NAMES}"),
        (3, "model.memory: expected a name, keys below it or a list of these, got 3"),
        (["fam", 3], "model.memory[1]: expected a name or keys, got 3"),
        (["fam", "fan"], f"model.memory[1].name: 'fan' is not one of {NAMES}; did you mean 'fam'?"),
        (
            ["fam", {"name": "infini", "rul": 1}],
            "model.memory.infini.rul: unknown key; did you mean 'rule'?",
        ),
        (
            ["window", {"name": "infini", "bank": 1}],
            "model.memory.infini.bank: unknown key; only name=hmt has it",
        ),
        (
            ["fam", {"name": "infini", "gate_init": "open"}],
            "model.memory.infini.gate_init: expected a number such as 0.1 or 3e-4, got 'open'",
        ),
        ({"name": "landmark", "block": 1}, "model.memory.block: 1 is too small; the least is 2"),
        (
            {"name": "none", "slots": 4},
            "model.memory.slots: unknown key; only name=fam, abc, rmt or armt has it",
        ),
        ({"name": "fam", "slot": 4}, "model.memory.slot: unknown key; did you mean 'slots'?"),
        ({"name": "fam", "window": -1}, "model.memory.window: -1 is too small; the least is 0"),
        (
            {"name": "fam", "random_state_passing": 1.5},
            "model.memory.random_state_passing: 1.5 is too large; the most is 1",
        ),
        (
            {"name": "fam", "query_position": "last"},
            "model.memory.query_position: 'last' is not one of current, previous",
        ),
    ],
)
def test_a_wrong_memory_is_told(memory: object, line: str) -> None:
    assert problems(small(model__memory=memory)) == (line,)


@pytest.mark.parametrize(
    ("curriculum", "line"),
    [
        (
            {"until": 5, "segments": 1},
            "train.curriculum: expected a list such as [{until: .., segments: ..}], got"
            " {'until': 5, 'segments': 1}",
        ),
        ([5], "train.curriculum[0]: expected keys below it, got 5"),
        (
            [{"until": 5, "segments": 1}, {"segments": 2}],
            "train.curriculum[1].until: missing; optimizer step at which the next stage begins",
        ),
        (
            [{"until": 5, "segments": 0}],
            "train.curriculum[0].segments: 0 is too small; the least is 1",
        ),
        (
            [{"until": 5, "segments": 1, "untill": 3}],
            "train.curriculum[0].untill: unknown key; did you mean 'until'?",
        ),
    ],
)
def test_a_wrong_curriculum_is_told_with_the_stage(curriculum: object, line: str) -> None:
    assert problems(small(train__curriculum=curriculum)) == (line,)


def test_problems_of_memories_in_a_list_are_told_with_all_others() -> None:
    raw = small(model__memory=["rmt", {"name": "hmt", "bank": 2}], train__min_lr=1)
    assert problems(raw) == (
        "model.memory: ['rmt', 'hmt']: rmt carries rows from the top of the stack to its bottom,"
        " past every layer's memory; name rmt alone, or with window",
        "model.memory.hmt.bank: 2 memories are fewer than a sample has segments, sample_len /"
        " segment_len = 256 / 64 = 4, so training would search what has left the bank; use at"
        " least 4, or a shorter data.sample_len",
        "train.min_lr: 1 is above train.lr = 0.001, where the schedule starts; use at most 0.001",
    )


def test_field_and_layout_problems_are_told_together() -> None:
    raw = small(
        model__num_heads=6,  # not by num_kv_heads, not by tp
        model__num_kv_heads=4,
        model__head_dim=16,
        model__ffn_size="wide",  # broken, so its layout cannot be judged
        data__segment_len=66,
        parallel__tp=4,
        train__batch_size=5,
        train__min_lr=1,
        lr=3,
    )
    assert problems(raw, world_size=8) == (
        "model.ffn_size: expected a whole number, got 'wide'",
        "lr: unknown key; did you mean 'train.lr'?",
        "model.num_kv_heads: 4 does not divide num_heads = 6 (each key head serves"
        " the same number of query heads); use 3 or 6",
        "model.num_heads: 6 is not a multiple of parallel.tp = 4; use 4 or 8, or lower parallel.tp",
        "data.sample_len: 256 is not a multiple of data.segment_len = 66; use 264 or 198",
        "train.batch_size: 5 is not a multiple of dp * micro_batch = 2 * 1 = 2; use 4 or 6",
        "train.min_lr: 1 is above train.lr = 0.001, where the schedule starts; use at most 0.001",
    )
