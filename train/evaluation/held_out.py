"""Evaluation inside training: what is measured, said, logged and written down on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from data.index import Corpus
from data.wording import counted
from model.decoder import Output
from model.memory.base import State
from parallel.mesh import Mesh
from train.agree import of_first
from train.build import Built
from train.evaluation.evaluate import costs, describe, say_verdict, write_files
from train.evaluation.layout_reader import LayoutReader, scattered_lanes
from train.evaluation.measure import ALL, choose_lanes, measure
from train.evaluation.positions import Evaluation
from train.evaluation.questions import Questions
from train.evaluation.questions import describe as in_words
from train.evaluation.report import REPORT, Answers, Report
from train.evaluation.tasks import say_answers, task_metrics
from train.evaluation.verdict import metrics
from train.reading.landmarks import choose_reading
from train.settings.config import Config
from train.tracking.tracker import NoTracker, Tracker

_TOGETHER = 8
"""Prompts in a call of the model, at most."""


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
        *,
        questions: Questions | None = None,
        title: str = "",
        folder: Path | None = None,
    ) -> None:
        """check_stop: called on all ranks before each call of the model; may raise.

        questions: to ask beside the loss. title, folder: of the report (None: it is not written).
        All ranks make it together.
        """
        self.config, self.corpus, self.built, self.mesh = config, corpus, built, mesh
        self.tracker, self.say, self.check_stop = tracker, say, check_stop
        self.questions, self.title, self.folder = questions, title, folder
        if questions is not None:
            _share_text(questions)

    def evaluate(self, step: int, *, compare: bool) -> Evaluation:
        """Return held-out losses after `step` steps; say and log what was found.

        compare: with the memory off and shuffled as well, with the verdict and a warning where
        the memory is not shown to be used; also ask the questions and write the report. All ranks
        call this together. Raises what check_stop raises, and then nothing was said or written.
        """
        evaluation = self._measure(step, compare and self._has_memory)
        answers = self._ask(step) if compare else []
        self._tell(step, evaluation, answers)
        if compare and self.mesh.rank == 0 and self.folder is not None:
            self._write(step, evaluation, answers, self.folder)
        return evaluation

    @property
    def _has_memory(self) -> bool:
        return self.config.model.memory.name != "none"

    def _measure(self, step: int, compare: bool) -> Evaluation:
        config = self.config

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
        return measure(
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

    def _ask(self, step: int) -> list[Answers]:
        """Return the answers to the questions, the same on all ranks."""
        if self.questions is None:
            return []
        train, model = self.config.train, self.built.model
        reader = LayoutReader(self.built, self.mesh, step=step, check_stop=self.check_stop)
        reading = choose_reading(self.config, model.config.vocab_size)
        # no more streams in a call than training's own calls have segments
        most = max(2, min(_TOGETHER, train.micro_batch * self.config.bptt_segments))
        found = self.questions.ask(reader, batch=most, prepare_batch=reading.prepare_tokens)
        return [Answers(result, in_words(result)) for result in found]

    def _tell(self, step: int, evaluation: Evaluation, answers: Sequence[Answers]) -> None:
        values = metrics(evaluation, "valid/")
        tasks: dict[str, float] = {}
        for found in answers:
            tasks |= task_metrics(found.result, "valid/")
        self.tracker.metrics(values | tasks, step)

        def say(text: str) -> None:
            self.say(f"step {step} | {text}")

        def warn(text: str) -> None:
            say(text)
            self.tracker.event(text, step)

        for name, value in values.items():
            if name.startswith("valid/loss"):
                say(f"{name} {value:.4f}")
        say(costs(evaluation))
        say_verdict(evaluation, say, warn)
        for found in answers:
            say_answers(found, say, warn, judged=self._has_memory)

    def _write(
        self, step: int, evaluation: Evaluation, answers: Sequence[Answers], folder: Path
    ) -> None:
        """Write an evaluation's page into the run's folder, and log it."""
        mesh = self.mesh
        parameters = f"{count_parameters(self.built):,}" + " a TP rank" * (mesh.tp > 1)
        where = f"{counted(mesh.world_size, 'rank')} on {mesh.device.type}"
        facts = [("run", str(folder)), ("step", f"{step:,}")]
        facts += describe(self.config, parameters, self.corpus, evaluation, where)
        about = {
            "run": str(folder),
            "step": step,
            "data": str(self.corpus.folder),
            "fingerprint": self.corpus.fingerprint,
        }
        notes = [f"left out: {damage}" for damage in self.corpus.damage]
        title = f"{self.title}, step {step:,}"
        report = Report(title, facts, evaluation, tasks=answers, notes=notes)
        try:
            files = write_files(folder / REPORT, report, about)
        except OSError as error:  # a full disk, say: the run is worth more than its page
            self.say(f"step {step} | {REPORT} was not written: {error}")
            return
        for path in files:
            self.tracker.artifact(path)


def _share_text(questions: Questions) -> None:
    """Let all ranks hide facts in rank 0's text, or they would not make the same calls.

    Each read it by itself, and a damaged file may have been left out on one node alone.
    """
    filler = questions.filler
    filler.pieces, filler.counts = of_first(lambda: (filler.pieces, filler.counts))


def count_parameters(built: Built) -> int:
    """Return the parameters of one TP rank; under ZeRO 3 they are cut, and counted whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in built.model.parameters())


def count_trained(built: Built) -> int:
    """Return how many of them learn."""
    return sum(
        getattr(p, "ds_numel", p.numel()) for p in built.model.parameters() if p.requires_grad
    )
