"""The memories a configuration can name: one class each, told apart by `name`.

A new memory is one class here and one name in the union `Memory`.
"""

from typing import Literal

from pydantic import Field

from train.units import Count, Index, Positive, Probability, Section


class NoMemory(Section):
    """No memory: a segment sees only itself. The baseline every memory must beat."""

    name: Literal["none"] = Field(description="Which memory: none.")


class WindowMemory(Section):
    """The keys and values of the last segments are attended too (Transformer-XL's cache)."""

    name: Literal["window"] = Field(description="Which memory: window.")
    segments: Count = Field(
        default=1,
        description="Previous segments whose keys every token also attends. Cost grows"
        " with it; no layer sees further back than this.",
    )


class FamMemory(Section):
    """TransformerFAM: each layer feeds its own slots back to itself, segment by segment."""

    name: Literal["fam"] = Field(description="Which memory: fam.")
    slots: Count = Field(
        default=64,
        description="Memory slots of each layer: what a segment leaves to all later ones. At"
        " most segment_len. More slots hold more and cost attention over slots per token.",
    )
    window: Index = Field(
        default=0,
        description="Previous segments (M) whose keys the tokens also attend, beside the slots."
        " The slots themselves are always computed from the current segment alone.",
    )
    state: Literal["paper", "norm", "latch"] = Field(
        default="norm",
        description="What a segment hands on. paper: the residual sum as published, which"
        " drifts over hundreds of segments; norm: the same, normalised; latch: gain * tanh("
        "beta * norm), bounded, and sharp enough to hold a value over very many segments.",
    )
    beta: Positive = Field(
        default=2.0,
        description="Used by state=latch only: its first sharpness. Higher holds longer and"
        " learns more slowly.",
    )
    query_position: Literal["current", "previous"] = Field(
        default="current",
        description="Rotary position of the slots' queries: the last positions of the current"
        " segment (so all its keys lie in the past), or those of the previous one.",
    )
    random_state_passing: Probability = Field(
        default=0.0,
        description="Probability, in training, that a step's new documents start from slots saved"
        " at the end of an earlier step in the place of the learned first ones. It teaches slots"
        " to be read after more segments than a sample has; the paper uses 0.8. 0 is off.",
    )


Memory = NoMemory | WindowMemory | FamMemory
