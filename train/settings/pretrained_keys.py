"""Keys that published models need beside their sizes, and what they must satisfy with others."""

from typing import Literal

from pydantic import Field

from train.settings.memories import Memory, window_of
from train.settings.remedies import Rule
from train.settings.units import Positive, Section, TokenLength


class RopeScalingSection(Section):
    """How rotary frequencies are slowed down, for lengths beyond those first trained on."""

    type: Literal["none", "linear", "llama3"] = Field(
        default="none",
        description="linear divides every frequency by factor; llama3 (Llama 3.1 and later) only"
        " the slow ones, by how often they turn in original_len tokens.",
    )
    factor: Positive = Field(
        default=1.0, description="What frequencies are divided by: 8 for eight times the length."
    )
    low_freq_factor: Positive = Field(
        default=1.0,
        description="Used by llama3: frequencies of fewer turns in original_len are divided by"
        " factor.",
    )
    high_freq_factor: Positive = Field(
        default=4.0,
        description="Used by llama3: frequencies of more turns in original_len stay as they are."
        " Above low_freq_factor; between the two the change is gradual.",
    )
    original_len: TokenLength = Field(
        default=8192,
        description="Used by llama3: tokens of the length first trained on. Units: 8k.",
    )


def _factor(kind: str, factor: float) -> str | None:
    if kind == "none" and factor != 1:
        return (
            f"{factor:g} does nothing while model.rope_scaling.type is none; set type to linear or"
            " llama3, or leave factor out"
        )
    if kind != "none" and factor < 1:
        return f"{factor:g} would quicken the rotation, for shorter lengths; use 1 or more"
    return None


def _high_freq_factor(kind: str, high: float, low: float) -> str | None:
    if kind != "llama3" or high > low:
        return None
    return (
        f"{high:g} is not above model.rope_scaling.low_freq_factor = {low:g}, and frequencies"
        f" between the two go from one to the other; use more than {low:g}"
    )


def _sliding_window(sliding_window: int | None, segment_len: int, memory: Memory) -> str | None:
    window = window_of(memory)
    seen = (window + 1) * segment_len
    if sliding_window is None or seen <= sliding_window:
        return None
    before = f" and {window} before it" if window else ""
    fits = sliding_window // (window + 1)
    return (
        f"the model was trained with {sliding_window} keys a token, but a token reads its segment"
        f"{before}, {seen} tokens; use data.segment_len {fits} or less, or leave sliding_window out"
        " to train the model to read further"
    )


_SCALING = "model.rope_scaling."

PRETRAINED_RULES: tuple[Rule, ...] = (
    Rule(_SCALING + "factor", (_SCALING + "type", _SCALING + "factor"), _factor),
    Rule(
        _SCALING + "high_freq_factor",
        (_SCALING + "type", _SCALING + "high_freq_factor", _SCALING + "low_freq_factor"),
        _high_freq_factor,
    ),
    Rule(
        "model.sliding_window",
        ("model.sliding_window", "data.segment_len", "model.memory"),
        _sliding_window,
    ),
)
