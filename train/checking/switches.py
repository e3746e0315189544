"""Which switch breaks it: the smallest set that does, found by halving."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from train.checking.shrink import Subject
from train.settings.config import ConfigError, validate
from train.settings.memories import MemoryList, Named


class Switch(NamedTuple):
    """One choice of a configuration, and what it is without."""

    key: str  # dotted; `dp` is no key of a configuration
    value: object
    off: object

    def describe(self) -> str:
        """Return it as in a configuration: parallel.cp=2."""
        if self.key.startswith("model.memory.") and self.off is None:
            return f"model.memory={self.value}"
        if self.key in ("model.lora", "train.curriculum"):
            return self.key
        if self.key == "data.sample_len":
            return "data.sample_len (several segments)"
        if isinstance(self.value, bool | None):
            return f"{self.key}={str(self.value).lower()}"
        return f"{self.key}={self.value}"


OTHER = {"zigzag": "contiguous", "contiguous": "zigzag", "ring": "all_gather", "all_gather": "ring"}


def switches_of(subject: Subject) -> list[Switch]:
    """Return every switch that is on and can be turned off by itself."""
    found = [*_of_layout(subject), *_of_training(subject), *_of_model(subject)]
    every = [switch for switch in found if switch.value != switch.off]
    return [s for s in every if with_only(subject, [x for x in every if x != s], every) is not None]


def with_only(
    subject: Subject, on: Collection[Switch], every: Collection[Switch]
) -> Subject | None:
    """Return the subject with the others of `every` off; None where that is no configuration."""
    off = [switch for switch in every if switch not in on]
    raw = subject.config.model_dump(mode="json")
    memory = raw["model"]["memory"]
    raw["model"]["memory"] = parts = list(memory) if isinstance(memory, list) else [memory]
    dp = subject.dp
    for switch in off:
        if switch.key == "dp":
            dp = 1
        elif switch.key.startswith("model.memory."):
            _turn_off_memory(parts, switch)
        else:
            _put(raw, switch.key, switch.off)
    raw["model"]["memory"] = parts if len(parts) > 1 else (parts or [{"name": "none"}])[0]
    _follow(raw, {switch.key for switch in off}, dp)
    ranks = dp * raw["parallel"]["tp"] * raw["parallel"]["cp"]
    try:
        return Subject(validate(raw, world_size=ranks), dp)
    except ConfigError:
        return None


def smallest(
    candidates: Sequence[Switch], breaks: Callable[[Sequence[Switch]], bool]
) -> list[Switch]:
    """Return a smallest set of switches that breaks; [] where it breaks with none on.

    breaks(on): whether it breaks with these alone; with all candidates it does. No switch of the
    result can be left out. QuickXplain (Junker 2004): about 2 k log2(n / k) calls for k of n.
    """

    def explain(base: list[Switch], grown: bool, rest: Sequence[Switch]) -> list[Switch]:
        if grown and breaks(base):
            return []
        if len(rest) == 1:
            return list(rest)
        half = len(rest) // 2
        second = explain([*base, *rest[:half]], True, rest[half:])
        first = explain([*base, *second], bool(second), rest[:half])
        return first + second

    return explain([], True, candidates) if candidates else []


def _of_layout(subject: Subject) -> list[Switch]:
    parallel = subject.config.parallel
    found = [
        Switch("parallel.cp", parallel.cp, 1),
        Switch("parallel.tp", parallel.tp, 1),
        Switch("dp", subject.dp, 1),
        Switch("parallel.zero", parallel.zero, 1),
    ]
    if parallel.tp > 1:
        found.append(Switch("parallel.sequence_parallel", parallel.sequence_parallel, False))
    if parallel.cp > 1:
        for key in ("attention", "layout"):
            value = getattr(parallel, key)
            found.append(Switch(f"parallel.{key}", value, OTHER[value]))
    return found


def _of_training(subject: Subject) -> list[Switch]:
    config, train = subject.config, subject.config.train
    whole = train.batch_size // subject.dp
    return [
        Switch("train.precision", train.precision, "fp32"),
        Switch("train.checkpointing", train.checkpointing, "none"),
        Switch("train.ffn_chunk", train.ffn_chunk, None),
        Switch("train.wavefront", train.wavefront, False),
        Switch("train.loss_chunk", train.loss_chunk, 1024),
        Switch("train.micro_batch", train.micro_batch, whole),
        Switch("train.bptt_len", train.bptt_len, None),
        Switch("train.curriculum", [s.model_dump() for s in train.curriculum], []),
        Switch("data.sample_len", config.data.sample_len, config.data.segment_len),
        Switch("data.packing", config.data.packing, False),
    ]


def _of_model(subject: Subject) -> list[Switch]:
    model = subject.config.model
    found = [
        Switch("model.lora", None if model.lora is None else model.lora.model_dump(), None),
        Switch("model.num_kv_heads", model.num_kv_heads, model.num_heads),
        Switch("model.tie_embeddings", model.tie_embeddings, False),
        Switch("model.qkv_bias", model.qkv_bias, False),
        Switch("model.rope_scaling.type", model.rope_scaling.type, "none"),
    ]
    parts = model.memory.root if isinstance(model.memory, MemoryList) else (model.memory,)
    for part in parts:
        if part.name != "none":
            found += _of_memory(part)
    return found


def _of_memory(part: Named) -> list[Switch]:
    """Return the memory itself, and its options that are not numbers of something."""
    found = [Switch(f"model.memory.{part.name}", part.name, None)]
    for name, value in part.model_dump(mode="json").items():
        default = type(part).model_fields[name].default
        if name == "name" or (part.name, name) == ("window", "segments"):
            continue
        if isinstance(value, bool | str) or name in ("window", "retrieve", "random_state_passing"):
            found.append(Switch(f"model.memory.{part.name}.{name}", value, default))
    return found


def _turn_off_memory(parts: list[dict[str, Any]], switch: Switch) -> None:
    _, _, name, *option = switch.key.split(".")
    for part in [part for part in parts if part["name"] == name]:
        if option:
            part[option[0]] = switch.off
        else:
            parts.remove(part)


def _put(raw: dict[str, Any], key: str, value: object) -> None:
    *sections, name = key.split(".")
    for section in sections:
        raw = raw[section]
    raw[name] = value


def _follow(raw: dict[str, Any], off: set[str], dp: int) -> None:
    """Set what depends on what is off."""
    if "train.micro_batch" in off:
        raw["train"]["micro_batch"] = raw["train"]["batch_size"] // dp
    if "data.sample_len" in off:
        raw["train"]["bptt_len"] = None
    if "model.rope_scaling.type" in off:
        raw["model"]["rope_scaling"]["factor"] = 1.0
