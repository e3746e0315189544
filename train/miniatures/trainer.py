"""From a miniature and a seed to a result on disk; finished seeds are not run again.

A seed's folder gets `weights.safetensors` after the training; its result, small enough to be
committed, is a file of another folder, after the check. A run that was killed in between begins
that seed's training, or only its check, anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data.durable import write_atomically
from model.decoder import Decoder
from model.init import count_parameters
from train.miniatures.check import Checked, check
from train.miniatures.config import CurriculumStage, FactsStage, Miniature
from train.miniatures.curriculum import run_curriculum
from train.miniatures.facts import FactsChecked, check_facts, run_facts
from train.miniatures.learner import Learner, with_memory
from train.miniatures.pools import run_pools
from train.miniatures.progress import Say

WEIGHTS, TRAINING = "weights.safetensors", "training.json"


def run_seed(
    miniature: Miniature, seed: int, folder: Path, results: Path, say: Say
) -> dict[str, Any]:
    """Return the result of one seed, from `results` where it is finished.

    folder: where its training is kept; results: the folder of every miniature's results.

    Raises:
        ValueError: there is a result of another configuration.
    """
    config = miniature.model_dump(mode="json", exclude={"seeds", "paper"})
    path = result_path(results, miniature.name, seed)
    done = _read(path, config)
    if done is not None:
        say(f"{path}: finished before; to run it again give another --results")
        return done
    folder.mkdir(parents=True, exist_ok=True)
    trained = _read(folder / TRAINING, _training_part(config))
    if trained is None:
        model, steps, seconds = train(miniature, seed, say)
        save_file(model.state_dict(), folder / WEIGHTS)
        trained = {
            "config": _training_part(config),
            "steps": steps,
            "train_cpu_s": round(seconds, 1),
            "parameters": count_parameters(model.config),  # without the vocabulary's padding
        }
        _write(folder / TRAINING, trained)
    model = restored(miniature, folder / WEIGHTS)
    result = {**trained, "config": config, "name": miniature.name, "seed": seed}
    if miniature.facts:
        result |= _facts_as_json(check_facts(model, miniature, say))
    else:
        result |= _as_json(check(model, miniature, say))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, result)
    return result


def result_path(results: Path, name: str, seed: int) -> Path:
    """Return where a seed's result is."""
    return results / name / f"seed-{seed}.json"


def train(miniature: Miniature, seed: int, say: Say) -> tuple[Decoder, int, float]:
    """Return the trained model, and the steps and CPU seconds it took."""
    learner, began = Learner(miniature, seed), time.process_time()

    def told(line: str) -> None:
        say(f"step {learner.steps_done}, {time.process_time() - began:.0f} CPU s: {line}")

    for stage in miniature.stages:
        learner.begin(stage)
        if isinstance(stage, CurriculumStage):
            run_curriculum(learner, stage, told)
        elif isinstance(stage, FactsStage):
            run_facts(learner, stage, told)
        else:
            run_pools(learner, stage, told)
    return learner.model, learner.steps_done, time.process_time() - began


def restored(miniature: Miniature, weights: Path) -> Decoder:
    """Return the trained model in the check's configuration."""
    last = miniature.stages[-1]
    learner = Learner(miniature.model_copy(update={"stages": (last,)}), 0)
    learner.model.load_state_dict(load_file(weights))
    return with_memory(learner.model, miniature, miniature.check.memory)


def _training_part(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("check", "name")}


def _as_json(checked: Checked) -> dict[str, Any]:
    return {
        "cells": [cell._asdict() for cell in checked.cells],
        "state_bytes": {str(tokens): size for tokens, size in checked.state_bytes.items()},
        "check_tokens": checked.tokens,
        "check_cpu_s": round(checked.seconds, 1),
        "tokens_per_s": round(checked.tokens_per_s),
        "torch": torch.__version__,
    }


def _facts_as_json(checked: FactsChecked) -> dict[str, Any]:
    return {
        "cells": [cell._asdict() for cell in checked.cells],
        "state_bytes": {},
        "check_tokens": checked.tokens,
        "check_cpu_s": round(checked.seconds, 1),
        "tokens_per_s": round(checked.tokens / checked.seconds),
        "torch": torch.__version__,
    }


def _read(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if differ := list(_differences(found["config"], config)):
        raise ValueError(
            f"{path} was made by another configuration (it differs in {', '.join(differ)});"
            " remove it, or give another --output and --results"
        )
    return found


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Yield the keys whose values differ. One that only one side knows is newer than the result."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() & new.keys():
            yield from _differences(old[key], new[key], f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{where}.{i}")
    elif old != new:
        yield where


def _write(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")
