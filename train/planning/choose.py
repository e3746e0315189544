"""The layouts of a configuration that keep every rule and fit, fastest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from train.build import to_model_config
from train.planning.cluster import Cluster
from train.planning.plan import Plan, plan_of, seconds
from train.planning.shapes import shapes_of
from train.settings.config import Config
from train.settings.problems import values_of
from train.settings.rules import broken_rules

Changes = dict[str, Any]
"""Values by dotted key."""


class Choice(NamedTuple):
    """A layout, and what it takes."""

    changes: Changes
    plan: Plan

    def words(self) -> str:
        """Return the layout as overrides."""
        return " ".join(f"{key}={value}" for key, value in self.changes.items())


class Choices(NamedTuple):
    """What was looked at."""

    ranked: list[Choice]  # those that fit, fastest first
    valid: int  # that keep every rule
    nearest: Choice | None  # of those that do not fit, the smallest: where none fits

    def describe(self, count: int) -> list[str]:
        """Return the best in lines."""
        if not self.ranked:
            if self.nearest is None:
                return ["no layout keeps the configuration's rules on so many ranks"]
            return [
                f"none of {self.valid} layouts fits; the smallest:",
                f"  {self.nearest.words()}",
                f"  {self.nearest.plan.memory.verdict()}",
            ]
        lines = [f"{len(self.ranked)} of {self.valid} layouts fit; the fastest:"]
        for choice in self.ranked[:count]:
            plan = choice.plan
            lines.append(
                f"  {seconds(plan.time.total):>8}  MFU {plan.mfu:5.1%}"
                f"  {plan.memory.total / 2**30:5.1f} GiB  {choice.words()}"
            )
        return lines


def choose(
    config: Config,
    cluster: Cluster,
    nodes: int,
    ranks_per_node: int,
    *,
    vocab_size: int = 0,
    segments: bool = False,
    only: Mapping[str, Sequence[Any]] | None = None,
) -> Choices:
    """Return the layouts of a configuration on nodes * ranks_per_node ranks.

    segments: also with half and twice the segment_len, which changes the model's reach. only: of
    these keys, these values.
    """
    world = nodes * ranks_per_node
    cluster = cluster.model_copy(update={"per_node": ranks_per_node})
    fitting, nearest, valid = [], None, 0
    values = values_of(Config, config.model_dump())
    for shape in _shapes(config, world, ranks_per_node, segments):
        if not (_wanted(shape, only or {}) and _valid(values, shape, world)):
            continue
        for changes in _ways(shape):
            if not _wanted(changes, only or {}):
                continue
            changed = _changed(config, changes)
            valid += 1
            model = to_model_config(changed, vocab_size)
            made = plan_of(changed, model, shapes_of(changed, world), cluster)
            choice = Choice(changes, made)
            if made.memory.fits:
                fitting.append(choice)
            elif nearest is None or made.memory.total < nearest.plan.memory.total:
                nearest = choice
    fitting.sort(key=lambda choice: choice.plan.days)
    return Choices(fitting, valid, nearest)


def _shapes(config: Config, world: int, per_node: int, segments: bool) -> Iterator[Changes]:
    """Yield what the rules have a say in; what breaks one is found by them."""
    powers = [2**i for i in range(world.bit_length())]
    lengths = [config.data.segment_len]
    if segments:
        lengths += [config.data.segment_len // 2, config.data.segment_len * 2]
    lanes = [n for n in powers if n <= min(16, config.train.batch_size)]
    for tp, cp, micro, length in itertools.product(
        [n for n in powers if n <= per_node], powers, lanes, lengths
    ):
        if world % (tp * cp) == 0:
            shape: Changes = {
                "parallel.tp": tp,
                "parallel.cp": cp,
                "train.micro_batch": micro,
            }
            yield shape | ({"data.segment_len": length} if segments else {})


def _ways(shape: Changes) -> Iterator[Changes]:
    """Yield the shape with every ZeRO stage, checkpointing and exchange of keys."""
    exchanges = ("ring", "all_gather") if shape["parallel.cp"] > 1 else ("ring",)
    for zero, mode, exchange in itertools.product(
        (1, 2, 3), ("none", "selective", "block"), exchanges
    ):
        yield shape | {
            "parallel.zero": zero,
            "parallel.attention": exchange,
            "train.checkpointing": mode,
        }


def _wanted(changes: Changes, only: Mapping[str, Sequence[Any]]) -> bool:
    return all(changes[key] in values for key, values in only.items() if key in changes)


def _valid(values: dict[str, object], changes: Changes, world: int) -> bool:
    """Return whether a layout keeps every rule of a configuration's values."""
    return not broken_rules(values | changes | {"world_size": world})


def _changed(config: Config, changes: Changes) -> Config:
    """Return the configuration with the changes, not checked."""
    sections: dict[str, Any] = {}
    for path, value in changes.items():
        section, key = path.split(".")
        sections.setdefault(section, {})[key] = value
    return config.model_copy(
        update={
            name: getattr(config, name).model_copy(update=values)
            for name, values in sections.items()
        }
    )
