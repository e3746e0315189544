"""What changed since a checkpoint, as its user reads it."""

from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.train.runs import small
from train.settings.config import Config, dump, validate
from train.starting.changes import find_changes

BOOKS: dict[str, Any] = {"path": "books", "weight": 3}
CODE: dict[str, Any] = {"path": "code", "max_epochs": 1}


def mixture(*parts: dict[str, Any], **changes: object) -> Config:
    return validate(small(data__train=list(parts), **changes))


def told(before: Config, after: Config) -> list[str]:
    manifest: Any = SimpleNamespace(config=yaml.safe_load(dump(before)), vocab_size=257)
    return [str(change) for change in find_changes(after, manifest)]


def test_a_mixture_is_saved_as_it_is_read() -> None:
    config = mixture(BOOKS, {"path": "https://host/code"}, data__cache_dir="/tmp/cache")
    saved = yaml.safe_load(dump(config))
    assert saved["data"]["train"] == [
        {"path": "books", "weight": 3.0, "max_epochs": None},
        {"path": "https://host/code", "weight": 1.0, "max_epochs": None},
    ]
    assert validate(saved) == config


def test_of_a_mixture_the_changed_keys_alone_are_told() -> None:
    after = {"path": "code", "weight": 2}
    assert told(mixture(BOOKS, CODE), mixture(BOOKS, after)) == [
        "data.train[1].max_epochs: 1 -> null",
        "data.train[1].weight: 1.0 -> 2.0",
    ]


def test_a_corpus_that_came_or_went_is_told_whole() -> None:
    whole = "{max_epochs: 1, path: code, weight: 1.0}"
    assert told(mixture(BOOKS), mixture(BOOKS, CODE)) == [f"data.train[1]: null -> {whole}"]
    assert told(mixture(BOOKS, CODE), mixture(BOOKS)) == [f"data.train[1]: {whole} -> null"]
    assert told(mixture(CODE), validate(small(data__train="books"))) == [
        f"data.train: [{whole}] -> books"
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"train__eval_every": 5, "data__valid": "v"}, "train.eval_every: null -> 5"),
        ({"train__lr": 3e-5}, "train.lr: 0.001 -> 3.0e-05"),
        ({"parallel__sequence_parallel": False}, "parallel.sequence_parallel: true -> false"),
    ],
)
def test_a_value_is_told_as_yaml_writes_it(change: dict[str, object], text: str) -> None:
    assert text in told(validate(small()), validate(small(**change)))
