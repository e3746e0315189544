"""Reads a run's configuration: a YAML file, `dotted.key=value` overrides, every check.

    config = load("configs/quickstart.yaml", ["model.memory.name=none", "train.steps=50"])

Nothing else has a say: no environment variable changes a value. `dump` writes the resolved
configuration, which loads to an equal one; `schema` is its JSON schema, for editors.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from train.settings.data import DataSection
from train.settings.memories import spelled_out
from train.settings.model import ModelSection
from train.settings.problems import ConfigError, find_problems, section_of, union_members
from train.settings.sections import (
    CheckpointSection,
    Config,
    ParallelSection,
    TrackingSection,
)
from train.settings.training import TrainSection

__all__ = [
    "CheckpointSection",
    "Config",
    "ConfigError",
    "DataSection",
    "ModelSection",
    "Override",
    "ParallelSection",
    "TrackingSection",
    "TrainSection",
    "dump",
    "load",
    "parse_overrides",
    "schema",
    "validate",
]


class Override(NamedTuple):
    """A value for a dotted key, read as YAML: `null`, `true` and `[1, 2]` are not text."""

    path: tuple[str, ...]
    value: object


def load(path: str | Path, overrides: Iterable[str] = (), world_size: int | None = None) -> Config:
    """Return the configuration in a YAML file with overrides applied and everything checked.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, later ones win. One that changes a memory's `name` drops
            the file's other keys of that memory; in a list of memories a key is reached by the
            memory's name, as in model.memory.infini.rule.
        world_size: the number of ranks; None leaves out what only it decides (dp).

    Raises:
        ConfigError: with one line for each problem, all of them.
    """
    parsed, problems = _parse_overrides(overrides)
    raw, unread = _read(Path(path))
    problems += unread
    if raw is not None:
        values = apply_overrides(raw, parsed)
        problems += find_problems(Config, values, world_size)
    if raw is None or problems:
        raise ConfigError(str(path), problems)
    return Config.model_validate(_without_empty_sections(Config, values))


def validate(
    raw: Mapping[str, object], *, source: str = "configuration", world_size: int | None = None
) -> Config:
    """Return the configuration in nested mappings, such as a checkpoint holds.

    Raises:
        ConfigError: its header names the source.
    """
    problems = find_problems(Config, raw, world_size)
    if problems:
        raise ConfigError(source, problems)
    return Config.model_validate(_without_empty_sections(Config, raw))


def parse_overrides(texts: Iterable[str]) -> list[Override]:
    """Return `dotted.key=value` texts as paths and YAML values.

    Raises:
        ConfigError: a line for each text that is not one.
    """
    overrides, problems = _parse_overrides(texts)
    if problems:
        raise ConfigError("overrides", problems)
    return overrides


def apply_overrides(raw: Mapping[str, object], overrides: Sequence[Override]) -> dict[str, object]:
    """Return raw values with the overrides set; unknown keys are set too, and found later."""
    values: dict[str, Any] = copy.deepcopy(dict(raw))
    unions = set(_union_paths(Config))
    for union in unions:
        names = [o.value for o in overrides if o.path == (*union, "name")]
        section = spelled_out(_at(values, union))
        if names and isinstance(section, dict) and section.get("name", names[-1]) != names[-1]:
            # the file's keys belong to the member that it named, not to the one asked for
            _at(values, union[:-1])[union[-1]] = {}
    for path, value in overrides:
        _set(values, path, value, unions)
    return values


def dump(config: Config) -> str:
    """Return the whole configuration as YAML; `load` of it gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file, with every field's help."""
    return Config.model_json_schema()


def _parse_overrides(texts: Iterable[str]) -> tuple[list[Override], list[str]]:
    overrides: list[Override] = []
    problems: list[str] = []
    for text in texts:
        key, equals, value = text.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            problems.append(f"{text}: not an override; write key=value such as train.steps=50")
            continue
        try:
            overrides.append(Override(path, yaml.safe_load(value)))
        except yaml.YAMLError:
            problems.append(f"{text}: the value is not YAML; quote it, as in {key}='\"...\"'")
    return overrides, problems


class _Loader(yaml.SafeLoader):
    """YAML, but a key that is given twice is a problem; plain YAML lets the last one win."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key, line = key_node.value, key_node.start_mark.line + 1
                if seen.setdefault(key, line) != line:
                    self.twice.append(
                        f"line {line}: {key!r} is given twice in one section, first in line"
                        f" {seen[key]}; keep one"
                    )
        return super().construct_mapping(node, deep)


def _read(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Return what the file holds (None: nothing usable) and the problems of its form."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        raw = loader.get_single_data()
    except OSError as error:
        return None, [f"cannot be read: {error.strerror or error}"]
    except UnicodeDecodeError as error:
        return None, [f"not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return None, [f"{where}not YAML: {error.problem or error.context}"]
    except yaml.YAMLError as error:
        return None, [f"not YAML: {error}"]
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        return None, ["expected keys such as name, model, data, train at the top level"]
    return raw, loader.twice


def _union_paths(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of each field that is a union told apart by `name`."""
    for name, field in section.model_fields.items():
        if union_members(field):
            yield (*path, name)
        elif (inner := section_of(field)) is not None:
            yield from _union_paths(inner, (*path, name))


def _set(
    section: dict[str, Any],
    path: tuple[str, ...],
    value: object,
    unions: set[tuple[str, ...]],
    here: tuple[str, ...] = (),
) -> None:
    """Set a value below sections, which are made where there are none.

    The next key in a list of named sections is a name: model.memory.infini.rule.
    """
    key, rest, here = path[0], path[1:], (*here, path[0])
    if not rest:
        section[key] = value
        return
    below = section.get(key)
    if here in unions:
        below = spelled_out(below)
        if isinstance(below, list) and len(rest) > 1:
            section[key] = parts = [spelled_out(part) for part in below]
            for part in parts:
                if isinstance(part, dict) and part.get("name") == rest[0]:
                    _set(part, rest[1:], value, unions, here)
                    return
    section[key] = inner = below if isinstance(below, dict) else {}
    _set(inner, rest, value, unions, here)


def _at(values: object, path: Iterable[str]) -> Any:
    """Return what nested mappings hold at a path, None where it ends early."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _without_empty_sections(
    section: type[BaseModel], raw: Mapping[str, object]
) -> dict[str, object]:
    """Return raw values without the sections that hold nothing, so that defaults apply."""
    kept: dict[str, object] = {}
    for key, value in raw.items():
        field = section.model_fields[key]
        inner = section_of(field)
        if inner is not None and isinstance(value, Mapping):
            kept[key] = _without_empty_sections(inner, value)
        elif value is not None or (inner is None and not union_members(field)):
            kept[key] = value
    return kept
