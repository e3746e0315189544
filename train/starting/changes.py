"""What of a configuration changed since a checkpoint was saved, and what of it a run may change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import yaml

from train.checkpoints.manifest import Manifest
from train.settings.config import Config, ConfigError, validate

FIXED = (
    "model",
    "data.segment_len",
    "data.sample_len",
    "data.packing",
    "data.shuffle_shards",
    "train.batch_size",
    "seed",
)
"""What makes another run of it: shapes of the weights, and which sample is which. The corpus is
another such thing, known by its fingerprint and not by its path."""

FREE = ("random_state_passing", "gate_lr", "search_from")
"""Of a memory, and so inside FIXED, but a matter of training only."""

STARTING = ("model.init_from",)
"""Inside FIXED, but read by a run's first start alone."""

PLACES = ("run_dir",)
"""Where things lie: a moved folder is no change."""

MEMORY = "model.memory.name"


class Change(NamedTuple):
    """A field whose value is another one now."""

    field: str
    before: Any
    after: Any

    @property
    def needs_fork(self) -> bool:
        """Whether the run cannot go on with it: it would be another run."""
        memory_free = self.field.startswith("model.memory.") and self.field.endswith(FREE)
        if memory_free or self.field in STARTING:
            return False
        return any(self.field == name or self.field.startswith(f"{name}.") for name in FIXED)

    @property
    def of_model(self) -> bool:
        """Whether the weights would have other shapes or another meaning."""
        return self.needs_fork and self.field.startswith("model.")

    def __str__(self) -> str:
        return f"{self.field}: {_as_yaml(self.before)} -> {_as_yaml(self.after)}"


def find_changes(config: Config, manifest: Manifest, vocab_size: int | None = None) -> list[Change]:
    """Return what changed since the checkpoint, by name; what is only spelled otherwise is not.

    vocab_size: what the data needs, where the configuration leaves it out.
    """
    saved = _effective(_flat(_complete(manifest.config)), manifest.vocab_size)
    now = _flat(config.model_dump(mode="json"))
    if now["model.vocab_size"] is None and vocab_size is None:
        vocab_size = manifest.vocab_size
    now = _effective(now, vocab_size)
    if saved[MEMORY] != now[MEMORY]:  # then the keys of each are missing in the other: one change
        saved, now = (
            {k: v for k, v in flat.items() if k == MEMORY or not k.startswith("model.memory.")}
            for flat in (saved, now)
        )
    return [
        change
        for name in sorted((saved.keys() | now.keys()) - set(PLACES))
        for change in _leaves(name, saved.get(name), now.get(name))
    ]


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """Return a saved configuration with the keys that it is too old to have, at their defaults."""
    try:
        return validate(values).model_dump(mode="json")
    except ConfigError:
        return values


def _effective(flat: dict[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """Return values with those that were left out as they work out to be."""
    defaults: dict[str, Any] = {
        "model.vocab_size": vocab_size,
        "model.head_dim": flat["model.hidden_size"] // flat["model.num_heads"],
        "train.bptt_len": flat["data.sample_len"],
    }
    return flat | {name: default for name, default in defaults.items() if flat.get(name) is None}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if f"{prefix}{name}" == "model.memory" and isinstance(value, list):
            # as overrides name them: model.memory.infini.rule
            flat[MEMORY] = " + ".join(part["name"] for part in value)
            for part in value:
                flat |= _flat(part, f"{prefix}{name}.{part['name']}.")
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _leaves(name: str, before: Any, after: Any) -> Iterator[Change]:
    """Yield what differs, of a list of sections each entry's keys by themselves."""
    if before == after:
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted(before.keys() | after.keys()):
            yield from _leaves(f"{name}.{key}", before.get(key), after.get(key))
    elif _lists_sections(before) and _lists_sections(after):
        for number, (one, other) in enumerate(zip_longest(before, after)):
            yield from _leaves(f"{name}[{number}]", one, other)
    else:
        yield Change(name, before, after)


def _lists_sections(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(part, Mapping) for part in value)


def _as_yaml(value: Any) -> str:
    """Return a value as a configuration file has it, in a line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
