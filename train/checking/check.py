"""The check: a small copy of a configuration on its ranks, against one plain process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from model.config import ModelConfig
from train.build import to_model_config
from train.checking import layout, plain
from train.checking.compare import Difference, compare
from train.checking.ranks import RankFailure, run_alone
from train.checking.shrink import Subject, shrink
from train.checking.slopes import TOLERANCE, slope_errors
from train.checking.switches import Switch, smallest, switches_of, with_only
from train.settings.config import Config, validate

Say = Callable[[str], None]

PROBE_TOLERANCE = 1e-6
"""Of sums of up to four numbers in float32."""


OF_ONE = ("model.", "data.", "train.bptt_len", "train.curriculum")
"""Keys that change what one process computes."""


class Comparison(NamedTuple):
    """One run of a layout beside the plain process."""

    subject: Subject
    differences: list[Difference]  # of every quantity; [] where a rank failed
    failure: str | None = None  # of a rank

    @property
    def passes(self) -> bool:
        """Return whether everything is within tolerance."""
        return self.failure is None and all(each.passes for each in self.differences)


class Report(NamedTuple):
    """What a check found."""

    config: Config  # the user's
    own: list[Difference]  # of one process: its gradients against the slopes of its loss
    comparisons: list[Comparison]  # float32 first, then the run's own type
    switches: list[Switch] | None  # a smallest set that breaks it; None: nothing is broken
    seconds: float

    @property
    def passes(self) -> bool:
        """Return whether everything is within tolerance."""
        return self.switches is None


def check(config: Config, most_ranks: int, say: Say) -> Report:
    """Return how far a configuration's layout is from one plain process; say: takes progress.

    Raises ValueError where most_ranks do not hold the layout's kinds of parallelism.
    """
    began, subject = time.monotonic(), shrink(config, most_ranks)
    references = References()
    say("one plain process: three steps in float64, and the slopes of its loss")
    references.of(subject)
    own = _slopes(subject)
    if not all(each.passes for each in own):
        say("its own gradients are wrong; looking for the switch that breaks them")
        every = [switch for switch in switches_of(subject) if switch.key.startswith(OF_ONE)]
        broken = _find(subject, every, lambda s: not all(each.passes for each in _slopes(s)), say)
        return Report(config, own, [], broken, time.monotonic() - began)
    comparisons, switches = [], None
    for each in _precisions(subject):
        say(f"{each.ranks} processes: {each.describe()}")
        comparisons.append(compare_layout(each, references))
        if not comparisons[-1].passes:
            say("not equal; looking for the switch that breaks it")
            switches = _find(
                each,
                switches_of(each),
                lambda s: not compare_layout(s, references).passes,
                say,
            )
            break
    return Report(config, own, comparisons, switches, time.monotonic() - began)


class References:
    """What one plain process computes, kept by all that it depends on."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[plain.Trained, plain.Trained]] = {}

    def of(self, subject: Subject) -> tuple[plain.Trained, plain.Trained]:
        """Return the subject's three steps in float64, and in its own type."""
        raw = subject.config.model_dump(mode="json", exclude={"parallel"})
        for key in ("checkpointing", "loss_chunk", "ffn_chunk", "wavefront", "micro_batch"):
            del raw["train"][key]
        key = json.dumps(raw, sort_keys=True)
        if key not in self.known:
            self.known[key] = run_alone(_train_plainly, subject, _model_of(subject))
        return self.known[key]


def _train_plainly(subject: Subject, model: ModelConfig) -> tuple[plain.Trained, plain.Trained]:
    own = torch.bfloat16 if subject.config.train.precision == "bf16" else torch.float32
    exact, rounded = (plain.train(subject.config, model, dtype) for dtype in (torch.float64, own))
    return exact, rounded


def _model_of(subject: Subject) -> ModelConfig:
    assert subject.config.model.vocab_size is not None
    return to_model_config(subject.config, subject.config.model.vocab_size)


def _slopes(subject: Subject) -> list[Difference]:
    found: dict[str, float] = run_alone(slope_errors, subject.config, _model_of(subject))
    return [Difference("slope", name, 0, error, TOLERANCE) for name, error in found.items()]


def _precisions(subject: Subject) -> list[Subject]:
    """Return the subject in float32, whose rounding hides nothing, and in its own type."""
    config = subject.config
    if config.train.precision == "fp32":
        return [subject]
    raw = config.model_dump(mode="json")
    raw["train"]["precision"] = "fp32"
    return [Subject(validate(raw), subject.dp), subject]


def compare_layout(subject: Subject, references: References) -> Comparison:
    """Return how far a layout's ranks are from one plain process, its keys' exchange included."""
    exact, rounded = references.of(subject)
    try:
        found, probe = layout.train(subject, _model_of(subject))
    except RankFailure as failure:
        return Comparison(subject, [], str(failure))
    differences = compare(found, exact, rounded, _model_of(subject))
    if probe is not None:
        differences.append(Difference("exchange", probe.name, 0, probe.error, PROBE_TOLERANCE))
    return Comparison(subject, differences)


def _find(
    subject: Subject, every: list[Switch], breaks: Callable[[Subject], bool], say: Say
) -> list[Switch]:
    """Return a smallest set of switches with which it breaks."""

    def with_these(on: Sequence[Switch]) -> bool:
        candidate = with_only(subject, on, every)
        broken = candidate is not None and breaks(candidate)
        names = ", ".join(switch.describe() for switch in on[:4]) or "every switch off"
        more = f" and {len(on) - 4} more" if len(on) > 4 else ""
        say(f"  {'breaks' if broken else 'equal '} with {names}{more}")
        return broken

    return smallest(every, with_these)
