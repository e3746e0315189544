"""The section train.profile."""

from pydantic import Field

from train.settings.remedies import Rule
from train.settings.units import Count, Index, Section


class ProfileSection(Section):
    """Traces of a few steps, and what is kept for the moment when memory runs out."""

    first: Count | None = Field(
        default=None,
        description="First step that is traced by torch's profiler; left out, none. Give it a few"
        " steps to become steady. Traces lie in RUN/profiles, those of rank 0 in MLflow too; open"
        " them in Perfetto or chrome://tracing.",
    )
    steps: Count = Field(default=2, description="Steps traced in a row.")
    ranks: tuple[Index, ...] = Field(default=(0,), description="Ranks that are traced.")
    memory: bool = Field(
        default=False,
        description="Trace the sizes of tensors too; on GPUs also keep the history of allocations,"
        " so that the snapshot that is written when memory runs out says where each was made.",
    )
    nvtx: bool = Field(
        default=False,
        description="Name phases, BPTT windows, layers, their parts and the optimizer for Nsight"
        " Systems (GPUs only).",
    )


def _steps(first: int | None, steps: int, all_steps: int) -> str | None:
    if first is None or first + steps - 1 <= all_steps:
        return None
    return (
        f"{first} and the {steps - 1} steps behind it are not all among the train.steps ="
        f" {all_steps}; use at most {max(1, all_steps - steps + 1)}"
    )


def _ranks(ranks: tuple[int, ...], world_size: int | None) -> str | None:
    if world_size is None or all(rank < world_size for rank in ranks):
        return None
    return f"{max(ranks)} is not among the {world_size} ranks; use 0 to {world_size - 1}"


PROFILE_RULES: tuple[Rule, ...] = (
    Rule(
        "train.profile.first",
        ("train.profile.first", "train.profile.steps", "train.steps"),
        _steps,
    ),
    Rule("train.profile.ranks", ("train.profile.ranks", "world_size"), _ranks),
)
