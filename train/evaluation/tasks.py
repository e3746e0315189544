"""Tasks beside the loss, by `longhaul evaluate` and inside training alike: asked, said, logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from data.index import Corpus
from data.tasks import corpus_texts, task_names
from train.evaluation.questions import Questions
from train.evaluation.report import Answers, TaskResult
from train.reading.landmarks import choose_reading, model_vocab_size
from train.settings.config import Config

DEPTHS = (0.0, 0.5, 1.0)
"""Of the answer, where it is said once: 0 the start of the document."""
SEGMENTS = (4, 16)
"""Of a document, where no lengths are given."""

_USED = {"yes": 1.0, "unclear": 0.0, "no": -1.0}


def default_lengths(segment_len: int) -> Sequence[int]:
    """Return the lengths in tokens of text, for segments of so many."""
    return [segments * segment_len for segments in SEGMENTS]


def open_questions(config: Config, valid: Corpus) -> Questions:
    """Return what train.eval_tasks asks; raise ValueError where it cannot be asked."""
    segment_len = choose_reading(config, model_vocab_size(config, valid.vocab_size)).segment_len
    return Questions(
        task_names(config.train.eval_tasks),
        valid.tokenizer(),
        lambda tokens: corpus_texts(valid, tokens),
        lengths=default_lengths(segment_len),
        depths=DEPTHS,
        prompts=config.train.eval_prompts,
        seed=0,  # the same questions for all runs, so that they can be compared
        segment_len=segment_len,
    )


def say_answers(
    found: Answers, say: Callable[[str], object], warn: Callable[[str], object], *, judged: bool
) -> None:
    """Say a task's verdict; judged: warn where the memory is not shown to be used."""
    say(found.words)
    if judged and found.result.verdict != "yes":
        warn(f"WARNING: {found.result.task}: memory used: {found.result.verdict}")


def task_metrics(result: TaskResult, prefix: str) -> dict[str, float]:
    """Return what is logged of a task: shares right, differences with intervals, verdict, costs.

    Shares over the questions whose fact lies in an earlier segment, and for each cell that with the
    memory on. memory_used: 1 yes, 0 unclear, -1 no. What was not measured is left out.
    """
    found = result.to_json()
    values: dict[str, Any] = {name: found[name]["value"] for name in ("on", "off", "shuffled")}
    for name in ("on_off", "on_shuffled"):
        bounds = found[name]
        values |= {name: bounds["value"]}
        values |= {f"{name}_low": bounds["low"], f"{name}_high": bounds["high"]}
    for cell in found["cells"]:
        second = next((key for key in ("depth", "pairs") if cell[key] is not None), None)
        place = f"{cell['length']}_tokens" + (f"_{second}_{cell[second]:g}" if second else "")
        values[f"on_{place}"] = cell["on"]["value"]
    values["memory_used"] = _USED[found["used"]]
    values |= {name: found[name] or None for name in ("state_bytes", "tokens_per_s")}
    return {
        f"{prefix}{result.task}/{name}": float(value)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }
