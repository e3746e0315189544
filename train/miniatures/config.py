"""What a miniature is: one YAML file, with the model, the stages of its training and the check.

    miniature = load_miniature("configs/miniatures/fam.yaml")

Budgets are optimizer steps, never seconds, so a seed trains the same model on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from data.tasks import PASSKEY_VOCAB, vocab_size
from model.config import ModelConfig
from train.settings.memories import HmtMemory, to_memory_config
from train.settings.model import ModelSection
from train.settings.problems import ConfigError
from train.settings.sections import RunName
from train.settings.units import (
    Count,
    Decay,
    Index,
    NonNegative,
    Positive,
    Probability,
    Section,
    TokenLength,
)

MAX_BLOCKS = 5
"""Blocks that one training sample spans with gradient, the question's own among them."""

NAMES = 64
"""Names that facts are told apart by: no document has more facts."""

Changes = dict[str, Any]
"""Keys of model.memory with other values; its name stays."""


class StageSection(Section):
    """What every stage of training has: its length and its learning rate."""

    steps: Count = Field(description="Optimizer steps of this stage.")
    lr: Positive = Field(default=2e-3, description="Peak learning rate; falls as a cosine.")
    min_lr: NonNegative = Field(default=0.0, description="Learning rate of the last step.")
    warmup_steps: Index = Field(default=50, description="Steps of linear rise to lr.")
    memory: Changes = Field(
        default_factory=dict, description="Keys of model.memory that differ in this stage."
    )


class MasteredStage(StageSection):
    """A stage that may end once it is learned: seeds need different times."""

    until: Probability | None = Field(
        default=None,
        description="Running share of right answers (of pools: of fresh rows) at which the stage"
        " ends; `steps` are then the most it may take. Left out, it takes them all.",
    )

    def mastered(self, right: float) -> bool:
        """Return whether this running share of right answers ends the stage."""
        return self.until is not None and right >= self.until


class CurriculumStage(MasteredStage):
    """Keys further and further back, then (amplify) filler that counts for more and more."""

    recipe: Literal["curriculum"] = Field(description="Which recipe: curriculum.")
    blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS - 1)] = Field(
        default=MAX_BLOCKS - 1,
        description="Largest distance of the key, in blocks before the question's.",
    )
    first: Annotated[int, Field(ge=1)] = Field(default=1, description="First distance.")
    amplify: NonNegative = Field(
        default=0.0,
        description="Length amplification, for memories whose writes add up: each filler block"
        " counts as c blocks, log c uniform in [0, a], and a rises to this. 0 is off.",
    )
    plain: Probability = Field(
        default=0.0,
        description="Share of rows without amplification: where all rows have it, short documents"
        " are unlearned.",
    )


class PoolStage(MasteredStage):
    """States that have read hundreds of blocks already, kept in two pools between steps."""

    recipe: Literal["pools"] = Field(description="Which recipe: pools.")
    pool: Count = Field(default=256, description="States in each pool, key-free and keyed.")
    aged_rows: Index = Field(
        default=18, description="Rows of a step that go on from the keyed pool, once it is full."
    )
    blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS - 1)] = Field(
        default=MAX_BLOCKS - 1,
        description="Most blocks read with gradient before the question. Through a state that holds"
        " well little gradient comes back, so 1 teaches writing fastest.",
    )
    noise: NonNegative = Field(
        default=0.1,
        description="Gaussian noise on a state taken from a pool, as a share of its row's RMS.",
    )
    update_noise: NonNegative = Field(
        default=0.0, description="The same on the state after each block read with gradient."
    )
    aging: Count = Field(
        default=16, description="Most filler blocks that taken states read without gradient."
    )
    aging_share: Probability = Field(default=0.5, description="Share of the steps that do so.")
    reset: Probability = Field(
        default=0.025, description="Chance that a key-free state begins anew when it is taken."
    )
    initial_rows: Probability = Field(
        default=0.3, description="Share of the fresh rows that begin a document."
    )


class FactsStage(StageSection):
    """One fact a block, first one, then more; the question is about one of them (hmt)."""

    recipe: Literal["facts"] = Field(description="Which recipe: facts.")
    blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS - 1)] = Field(
        default=MAX_BLOCKS - 1, description="Most facts before the question's block."
    )
    first: Annotated[int, Field(ge=1)] = Field(default=1, description="Facts at first.")
    block_len: Annotated[TokenLength, Field(ge=10)] | None = Field(
        default=None,
        description="Tokens of a block in this stage; left out, segment_len. In short ones the"
        " search learns in 200 steps what it does not find in 1000 of 64 tokens.",
    )
    search_loss: NonNegative = Field(
        default=1.0,
        description="Weight of the search's own loss, which tells it the block that was asked for"
        " among those of all rows. 0 leaves the search to the answer's gradient, which hardly"
        " reaches it.",
    )


Stage = Annotated[CurriculumStage | PoolStage | FactsStage, Field(discriminator="recipe")]


class CheckSection(Section):
    """The streaming check: which lengths, how many prompts."""

    lengths: tuple[TokenLength, ...] = Field(
        default=(320, 640, 3_200, 32_000, 320_000, 1 << 20),
        description="Tokens from the first block to the question, multiples of segment_len.",
    )
    places: tuple[Literal["start", "middle", "end"], ...] = Field(
        default=("start", "middle", "end"),
        description="Block of the key: the first, the middle one, the one before the question.",
    )
    prompts: Count = Field(default=32, description="Documents for each length and place.")
    prompts_at_once: Count | None = Field(
        default=None, description="Documents read side by side; left out, all of them."
    )
    blocks_at_once: Count = Field(
        default=1, description="Blocks in one forward pass. The result does not change."
    )
    seed: Index = Field(default=1_000_000, description="Seed of the check's documents.")
    memory: Changes = Field(
        default_factory=dict, description="Keys of model.memory that differ in the check."
    )


class PaperSection(Section):
    """What the paper reports, for the table."""

    title: str = Field(description="Name of the method and the paper's number.")
    result: str = Field(description="The paper's headline result, model and length.")
    differs: str = Field(description="How this miniature differs from the paper's method.")


class Miniature(Section):
    """A miniature: one YAML file under configs/miniatures/."""

    name: RunName = Field(description="Folder of its results, and its row in the table.")
    seeds: tuple[Index, ...] = Field(default=(0, 1, 2), description="Seeds to run.")
    model: ModelSection = Field(description="The decoder and its memory.")
    segment_len: TokenLength = Field(default=64, description="Tokens of a block.")
    batch_size: Count = Field(default=32, description="Rows of a step.")
    weight_decay: NonNegative = Field(
        default=0.01, description="Of the matrices; embeddings, norms and gates have none."
    )
    beta1: Decay = Field(default=0.9, description="AdamW's first decay.")
    beta2: Decay = Field(default=0.98, description="AdamW's second decay.")
    clip: Positive = Field(default=1.0, description="Largest norm of the gradient.")
    stages: tuple[Stage, ...] = Field(min_length=1, description="The training, in order.")
    check: CheckSection = Field(default_factory=CheckSection, description="The check.")
    paper: PaperSection = Field(description="The result that this stands beside.")

    @property
    def facts(self) -> bool:
        """Whether the task is one fact a block, instead of one key in filler."""
        return isinstance(self.stages[0], FactsStage)


def load_miniature(path: str | Path) -> Miniature:
    """Return the miniature in a YAML file, every stage's memory checked.

    Raises:
        ConfigError: a line for each problem.
    """
    path = Path(path)
    try:
        miniature = Miniature.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    except ValidationError as error:
        raise ConfigError(str(path), list(_lines(error))) from None
    if problems := _problems(miniature):
        raise ConfigError(str(path), problems)
    return miniature


def model_config(miniature: Miniature, changes: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the model package's description, with `changes` in the memory's keys."""
    section = miniature.model
    memory = section.memory
    if changes:
        memory = type(memory).model_validate({**memory.model_dump(), **changes})
    known = {field.name for field in fields(ModelConfig)} - {"memory", "vocab_size", "head_dim"}
    return ModelConfig(
        **{name: getattr(section, name) for name in known},
        vocab_size=section.vocab_size or _vocab_size(miniature),
        head_dim=section.head_dim or section.hidden_size // section.num_heads,
        memory=to_memory_config(memory),
    )


def _vocab_size(miniature: Miniature) -> int:
    if miniature.facts:
        return vocab_size(NAMES)
    return PASSKEY_VOCAB + (landmark_of(miniature) is not None)


def landmark_of(miniature: Miniature) -> int | None:
    """Return the token that ends each block; None where the memory has no landmarks."""
    return PASSKEY_VOCAB if miniature.model.memory.name == "landmark" else None


def _lines(error: ValidationError) -> list[str]:
    return [
        f"{'.'.join(map(str, part['loc']))}: {part['msg'].removeprefix('Value error, ')}"
        for part in error.errors()
    ]


def _problems(miniature: Miniature) -> list[str]:
    problems = []
    changed = [(f"stages.{i}", stage.memory) for i, stage in enumerate(miniature.stages)]
    for where, changes in [*changed, ("check", miniature.check.memory)]:
        try:
            model_config(miniature, changes)
        except ValidationError as error:
            problems += [f"{where}.memory.{line}" for line in _lines(error)]
        except ValueError as error:
            problems.append(f"{where}.memory: {error}")
    problems += _fact_problems(miniature)
    unit = miniature.segment_len
    for length in miniature.check.lengths:
        if length % unit or length < 3 * unit:
            problems.append(
                f"check.lengths: {length} is not 3 or more blocks of segment_len={unit};"
                f" use {max(3, round(length / unit)) * unit}"
            )
    return problems


def _fact_problems(miniature: Miniature) -> list[str]:
    kinds = {isinstance(stage, FactsStage) for stage in miniature.stages}
    if kinds == {False}:
        return []
    problems, memory = [], miniature.model.memory
    if len(kinds) > 1:
        problems.append("stages: facts and other recipes are two tasks; use one of them")
    most = max(miniature.check.lengths) // miniature.segment_len - 1
    if not isinstance(memory, HmtMemory):
        problems.append(f"stages: facts searches a bank, {memory.name} has none; use hmt")
    elif most > min(NAMES, memory.bank):
        problems.append(
            f"check.lengths: {max(miniature.check.lengths)} has {most} facts, and there are {NAMES}"
            f" names and a bank of {memory.bank}; use at most"
            f" {(min(NAMES, memory.bank) + 1) * miniature.segment_len}, or a larger bank"
        )
    return problems
