"""Evaluation inside training: what is measured, said, logged and written down on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from data.index import Corpus
from model.decoder import Output
from model.memory.base import State
from model.memory.hmt import Hmt
from parallel.mesh import Mesh
from train.build import Built
from train.evaluation.evaluate import describe, say_verdict, write_files
from train.evaluation.measure import ALL, choose_lanes, measure
from train.evaluation.positions import Evaluation
from train.evaluation.report import REPORT, Report
from train.evaluation.verdict import metrics
from train.reading import choose_reading
from train.settings.config import Config
from train.tracking.tracker import NoTracker, Tracker


class HeldOut:
    """The held-out documents of a run, read by the model as it is in training, on all ranks."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        built: Built,
        mesh: Mesh,
        tracker: Tracker | NoTracker,
        say: Callable[[str], None],
        check_stop: Callable[[], None],
    ) -> None:
        """check_stop: called on all ranks before each call of the model; may raise."""
        self.config, self.corpus, self.built, self.mesh = config, corpus, built, mesh
        self.tracker, self.say, self.check_stop = tracker, say, check_stop

    def evaluate(self, step: int, *, compare: bool) -> Evaluation:
        """Return held-out losses after `step` steps, and say and log them.

        compare: with the memory off and shuffled as well, with the verdict and a warning where
        the memory is not shown to be used. All ranks call this together. Raises what check_stop
        raises.
        """
        config = self.config
        compare = compare and config.model.memory.name != "none"

        def forward(
            tokens: Tensor, starts: Tensor, state: State, labels: Tensor, scale: Tensor
        ) -> Output:
            self.check_stop()
            # step: a memory that trains in stages is read as it is now
            result: Output = self.built.engine(
                tokens, starts, state, labels=labels, scale=scale, step=step
            )
            return result

        reading = choose_reading(config, self.built.model.config.vocab_size)
        unit = scattered_lanes(self.built)
        documents = len(self.corpus.lengths)
        evaluation = measure(
            forward,
            self.corpus,
            segment_len=reading.segment_len,
            prepare=reading.prepare,
            segments=config.num_segments,
            lanes=choose_lanes(documents, config.train.batch_size, self.mesh.dp, unit),
            unit=unit,
            tokens=config.train.eval_tokens,
            conditions=ALL if compare else ("on",),
            mesh=self.mesh,
            layout=self.built.layout,
            micro_batch=config.train.micro_batch,
        )
        values = metrics(evaluation, "valid/")
        self.tracker.metrics(values, step)

        def say(text: str) -> None:
            self.say(f"step {step} | {text}")

        def warn(text: str) -> None:
            say(text)
            self.tracker.event(text, step)

        for name, value in values.items():
            if name.startswith("valid/loss"):
                say(f"{name} {value:.4f}")
        say_verdict(evaluation, say, warn)
        return evaluation

    def report(self, step: int, evaluation: Evaluation, title: str, folder: Path) -> None:
        """Write an evaluation's page into the run's folder, and log it (rank 0)."""
        mesh = self.mesh
        parameters = f"{count_parameters(self.built):,}" + " a TP rank" * (mesh.tp > 1)
        where = f"{mesh.world_size} ranks on {mesh.device.type}"
        facts = [("run", str(folder)), ("step", f"{step:,}")]
        facts += describe(self.config, parameters, self.corpus, evaluation, where)
        about = {
            "run": str(folder),
            "step": step,
            "data": str(self.corpus.folder),
            "fingerprint": self.corpus.fingerprint,
        }
        notes = [f"left out: {damage}" for damage in self.corpus.damage]
        report = Report(title=title, facts=facts, evaluation=evaluation, notes=notes)
        for path in write_files(folder / REPORT, report, about):
            self.tracker.artifact(path)


def scattered_lanes(built: Built) -> int:
    """Return what lanes come in multiples of: sequence parallelism cuts hmt's rows evenly then."""
    return built.model.linears.scattered if isinstance(built.model.memory, Hmt) else 1


def count_parameters(built: Built) -> int:
    """Return the parameters of one TP rank; under ZeRO 3 they are cut, and counted whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in built.model.parameters())


def count_trained(built: Built) -> int:
    """Return how many of them learn."""
    return sum(
        getattr(p, "ds_numel", p.numel()) for p in built.model.parameters() if p.requires_grad
    )
