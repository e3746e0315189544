"""`longhaul evaluate --track`: what was found, in the MLflow run of the checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from train.checkpoints.manifest import Manifest
from train.evaluation.positions import Evaluation
from train.evaluation.report import Answers
from train.evaluation.tasks import task_metrics
from train.evaluation.verdict import judge, metrics
from train.settings.config import Config
from train.tracking.tracker import Tracker


def log_evaluation(
    folder: Path,
    manifest: Manifest,
    config: Config,
    evaluation: Evaluation,
    answers: Sequence[Answers],
    files: list[Path],
) -> None:
    """Log an evaluation, its tasks and its report's files to the checkpoint's MLflow run."""
    with open_tracker(folder, config) as tracker:
        values = metrics(evaluation, "evaluate/")
        for found in answers:
            values |= task_metrics(found.result, "evaluate/")
        tracker.metrics(values, manifest.step)
        verdict = judge(evaluation)
        if verdict is not None:
            tracker.event(f"evaluated: {verdict}", manifest.step)
        for path in files:
            tracker.artifact(path, "evaluate")


@contextmanager
def open_tracker(folder: Path, config: Config) -> Iterator[Tracker]:
    """Open the tracker of the run that a checkpoint is of, for as long as this lasts."""
    run_dir = folder.resolve().parent.parent
    done = (run_dir / "DONE").exists()
    tracker = Tracker.open(
        run_dir,
        experiment=config.tracking.experiment,
        run_name=config.name,
        uri=config.tracking.uri,
        system_every_s=0,
    )
    try:
        yield tracker
    finally:
        tracker.close(status="FINISHED" if done else "SCHEDULED")
        if tracker.problem:
            print(f"tracking: not shipped: {tracker.problem}", file=sys.stderr)
