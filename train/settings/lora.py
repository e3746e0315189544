"""The `model.lora` section: low-rank adapters beside frozen weights; see model.lora."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from model.config import LORA_ALSO, LORA_TARGETS, LoraAlso, LoraTarget
from train.settings.remedies import did_you_mean
from train.settings.units import Count, Positive, Section, shown


def _names(known: Sequence[str], *, least: int, every: bool) -> Callable[[object], object]:
    """Return a parser of a list of known names; every: `all` stands for all of them."""

    def parse(value: object) -> tuple[str, ...]:
        some = ", ".join(known)
        if every and value == "all":
            return tuple(known)
        if isinstance(value, str) or not isinstance(value, Sequence):
            either = "all or " if every else ""
            raise ValueError(f"expected {either}a list of {some}, got {shown(value)}")
        for name in value:
            if name not in known:
                hint = did_you_mean(str(name), [*known, *(["all"] if every else [])])
                raise ValueError(f"{shown(name)} is not one of {some}{hint}")
        if len(value) < least:
            raise ValueError(f"names nothing; give some of {some}, or all")
        return tuple(name for name in known if name in value)

    return parse


_read_targets = _names(LORA_TARGETS, least=1, every=True)
_read_also = _names(LORA_ALSO, least=0, every=False)
_ListOrAll = Annotated[list[LoraTarget], Field(min_length=1)] | Literal["all"]
Targets = Annotated[
    tuple[LoraTarget, ...], BeforeValidator(_read_targets, json_schema_input_type=_ListOrAll)
]
Also = Annotated[
    tuple[LoraAlso, ...], BeforeValidator(_read_also, json_schema_input_type=list[LoraAlso])
]


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021): the checkpoint's weights stay as they are."""

    rank: Count = Field(
        description="Width of the adapters: 8 to 64 is usual. Trained parameters grow with it."
    )
    alpha: Positive = Field(
        default=16.0,
        description="The adapters' output counts alpha / rank times. Once or twice the rank is"
        " usual; a change of it acts like a change of the learning rate.",
    )
    targets: Targets = Field(
        default=LORA_TARGETS,
        description="Linear maps of each block that get one: qkv (queries, keys and values),"
        " output (of attention), gate_up and down (the feed-forward layer); or all.",
    )
    train_also: Also = Field(
        default=(),
        description="What else of the checkpoint's weights learns: norms, embeddings (the output"
        " layer with them). Both help a model to longer contexts than it has seen. The memory's"
        " own parameters always learn.",
    )
