"""The section train.guard."""

from typing import Annotated, Literal

from pydantic import Field

from train.settings.units import Count, Positive, Section, Whole


class GuardSection(Section):
    """What is done about steps whose loss or gradient is bad; train.max_nonfinite stops the run."""

    nonfinite: Literal["skip", "rollback"] = Field(
        default="skip",
        description="A loss or gradient that is not finite never changes a weight. skip goes on"
        " with the next samples; rollback takes the weights of the newest good checkpoint and goes"
        " past all samples since then.",
    )
    spike: Literal["ignore", "tell", "skip", "rollback"] = Field(
        default="tell",
        description="A loss far above the recent ones, see spike_sigmas and spike_factor. tell"
        " trains on it and says so; skip and rollback do as for nonfinite.",
    )
    spike_sigmas: Positive = Field(
        default=8.0,
        description="A spike is above the median of recent losses by so many of their standard"
        " deviations (1.4826 times the median distance from the median)",
    )
    spike_factor: Annotated[Positive, Field(ge=1)] = Field(
        default=1.2, description="and above this many times the median."
    )
    spike_window: Annotated[int, Field(ge=2), Whole] = Field(
        default=100,
        description="Losses of steps with an update that are compared with; nothing is a spike"
        " until half of them are known.",
    )
    max_rollbacks: Count = Field(
        default=3,
        description="Rollbacks, each within checkpoint.every steps of the one before, until the run"
        " stops.",
    )
