"""Checkpoints of a few numbers, saved as training does it."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from train.checkpoints.folder import Manifest
from train.checkpoints.saver import Saver


def manifest_of(step: int) -> Manifest:
    return Manifest(
        step=step,
        position=4 * step,
        updates=step,
        nonfinite=0,
        layout={"tp": 1, "cp": 1, "dp": 2, "zero": 1},
        config={"train": {"lr": 0.1}},
        data="fingerprint",
        vocab_size=257,
        parameters={},
        versions={},
        files={},
    )


def open_saver(folder: Path, max_failures: int = 1) -> Saver:
    timeout = timedelta(seconds=30)
    return Saver(folder, timeout=timeout, max_failures=max_failures, say=lambda text: None)


def save_step(folder: Path, step: int) -> None:
    """Save tensors that tell their rank and step."""
    saver = open_saver(folder)
    value = 100.0 * step + dist.get_rank()
    saver.start({"a/b@0": torch.full((64,), value)}, manifest_of(step))
    saver.finish()


def save_steps(folder: Path, *steps: int) -> None:
    for step in steps:
        save_step(folder, step)


def saved(folder: Path, *steps: int, ranks: int = 2) -> list[Path]:
    """Return the paths of checkpoints saved by so many ranks."""
    run_ranks(ranks, save_steps, folder, *steps)
    return [folder / f"step-{step:08d}" for step in steps]
