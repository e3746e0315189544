"""What a run says of itself, from its start to its end: terminal, run folder, MLflow, timeline."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from data.wording import counted
from model.memory.base import compact, named_tensors
from parallel.mesh import Mesh, why_on_cpu
from train.build import Built
from train.checkpoints.names import step_name
from train.checkpoints.saver import Result
from train.cluster.lead import LeadTime
from train.evaluation.held_out import count_parameters, count_trained
from train.evaluation.positions import Evaluation
from train.loop import StepResult, TrainState
from train.reading.corpora import Course, keys_per_token
from train.reading.left_out import LeftOut, describe
from train.settings.config import Config, dump
from train.speed.metrics import FORMULA, FORMULA_NAME, mfu, peak_flops, training_flops_per_token
from train.speed.profiling import FOLDER
from train.starting.again import continue_command
from train.starting.init_from import describe_start
from train.starting.inputs import Inputs
from train.starting.resume import RunFolder
from train.tracking.describe import describe_run
from train.tracking.progress import Progress, Status
from train.tracking.summary import plot, summarise
from train.tracking.tracker import NoTracker, Tracker
from train.tracking.tracker import Status as EndStatus
from train.watch.attempt import Watch
from train.watch.stragglers import Stragglers


class Reporter:
    """The voice of one attempt. Every rank has one; rank 0's is heard."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        course: Course,
        built: Built,
        mesh: Mesh,
        watch: Watch,
        folder: RunFolder,
    ) -> None:
        self.config, self.inputs, self.course, self.built = config, inputs, course, built
        self.mesh, self.watch, self.folder, self.first = mesh, watch, folder, mesh.rank == 0
        self.timeline = watch.timeline
        self.stragglers = Stragglers(watch.nodes, watch.waiting, mesh.device)
        self.tokens_per_step = config.train.batch_size * config.data.sample_len
        self.flops = training_flops_per_token(
            built.model.config,
            config.data.segment_len,
            keys_per_token(course.streams, built.model.config.window),
        )
        self.peak = peak_flops(mesh.device, config.train.precision)
        self.lead = LeadTime(config.run_dir)
        self.damage = LeftOut(inputs.train, mesh.device)
        self.status: EndStatus = "FINISHED"

    def open(self, stack: contextlib.ExitStack, first_step: int) -> None:
        """Begin progress and tracking, to be closed with the stack."""
        self.progress = stack.enter_context(
            Progress(
                self.config.train.steps,
                first=first_step,
                log_every=self.config.train.log_every,
                ranks=self.mesh.world_size,
                shown=self.first,
            )
        )
        self.tracker = self._open_tracker(stack)

    def say(self, text: str) -> None:
        """Print a line (rank 0)."""
        if self.first:
            print(text, file=sys.stderr, flush=True)

    def announce(self, state: TrainState) -> None:
        """Say what runs, and write it down; all ranks call this."""
        if not self.first:
            self.left_out(state.step)
            return
        config, mesh = self.config, self.mesh
        self.folder.path.mkdir(parents=True, exist_ok=True)
        parameters, trained = count_parameters(self.built), count_trained(self.built)
        some = f", {trained / 1e6:.2f}M of them trained" if trained < parameters else ""
        self.progress.say(
            f"{self.title} | {counted(mesh.world_size, 'rank')} on {mesh.device.type}"
            f" | {parameters / 1e6:.2f}M parameters a TP rank{some}"
            f" | {self.tokens_per_step:,} tokens a step | peak {self.peak.source}"
        )
        if mesh.device.type == "cpu" and (reason := why_on_cpu()):
            self.progress.say(f"WARNING: this machine's GPUs are idle: {reason}")
        for line in self.course.describe(config.train.steps):
            self.progress.say(line)
        describe_run(
            self.tracker,
            self.folder.path,
            dump(config),
            self.inputs.train.describe(),
        )
        self.tracker.params(config.model_dump(mode="json"))
        self.tracker.tags({"formula.mfu": FORMULA, "peak": self.peak.source})
        if (origin := self.folder.parent) is not None:
            self.tracker.tags({f"parent.{name}": value for name, value in origin.items()})
        self.watch.note_start(state.step)
        if text := self._origin(state):
            self.progress.say(text)
            self.tracker.event(text, state.step)
        self.left_out(state.step)

    def left_out(self, step: int) -> None:
        """Say what data.on_damage=skip left out since this was asked; all ranks call this."""
        if self.config.data.on_damage != "skip" or not (texts := self.damage.news()):
            return
        text = describe(texts, step)
        self.progress.say(f"WARNING: {text}")
        self.timeline.add("left_out", step, text, {"left_out": texts})

    def begin_step(self) -> float:
        """Return the time at which a step begins."""
        self.stragglers.begin()
        return time.perf_counter()

    def step(self, state: TrainState, result: StepResult, seconds: float) -> None:
        """Log a step that took so many seconds; all ranks call this."""
        tokens_per_s = self.tokens_per_step / seconds
        used = mfu(tokens_per_s, self.flops, self.peak, self.mesh.world_size)
        row = {
            "step": state.step,
            "loss": result.loss,
            "grad_norm": math.nan if result.grad_norm is None else result.grad_norm,
            "lr": result.lr,
            "targets": result.targets,
            "tokens_per_s": tokens_per_s,
            "mfu": used,
            "time": time.time(),
        }
        self.lead.step(seconds)
        if self.first:
            self.folder.log(row)
        self.stragglers.add(seconds)
        due = state.step % self.config.train.log_every == 0 or state.step == 1
        if due:
            metrics = {name: value for name, value in row.items() if name not in ("step", "time")}
            metrics |= memory_norms(state) | self.course.metrics(state.step)
            metrics |= self.inputs.metrics() | self._spread(state)
            self.left_out(state.step)
            if self.damage.count:
                metrics["data/left_out"] = float(self.damage.count)
            self.tracker.metrics(metrics, state.step)
        self.progress.update(
            state.step,
            Status(result.loss, result.grad_norm, result.lr, tokens_per_s, used, self._held()),
        )

    def traced(self, path: Path) -> None:
        """Say where a trace of this rank is."""
        self.progress.say(f"traced: {path}")
        self.tracker.artifact(path, FOLDER)

    def saved(self) -> None:
        """Say how saves ended, once they have."""
        while (save := self.folder.saver.news()) is not None:
            self._saved(save)

    def _saved(self, save: Result) -> None:
        if save.error is not None:
            self.progress.say(f"step {save.step}: {save.error}")
            self.timeline.add("not_saved", save.step, f"not saved: {save.error}")
            return
        text = f"saved {save.path} in {save.seconds:.2f} s"
        self.progress.say(text)
        self.timeline.add("saved", save.step, text, {"seconds": save.seconds})
        self.tracker.metrics({"save_s": save.seconds}, save.step)
        if self.first and (advice := self.lead.saved(save.seconds)):
            self.progress.say(advice)
            self.timeline.add("warned", save.step, advice)

    def finished(self, state: TrainState, evaluation: Evaluation | None) -> None:
        """Sum the run up, draw its picture and mark it done (rank 0)."""
        if not self.first:
            return
        history = self.folder.history()
        picture = plot(self.folder.path, history=history, evaluation=evaluation, title=self.title)
        self.tracker.artifact(picture)
        self.folder.finish(state.step)
        self.timeline.add("finished", state.step, f"finished at step {state.step}")
        text = summarise(
            self.folder.path,
            history=history,
            evaluation=evaluation,
            formula=FORMULA_NAME,
            peak_source=self.peak.source,
            checkpoint=self.folder.checkpoints / step_name(state.step),
            tracking=self.tracker.uri if isinstance(self.tracker, Tracker) else "off",
            continue_command=continue_command(steps=2 * state.step),
        )
        self.progress.say(text)

    @property
    def title(self) -> str:
        """The run in a line: name, memory, layout, precision."""
        config, mesh = self.config, self.mesh
        parallel = config.parallel
        scattered = "+SP" if parallel.sequence_parallel and mesh.tp > 1 else ""
        return (
            f"{config.name}: memory {config.model.memory.name}, TP {mesh.tp}{scattered} x CP"
            f" {mesh.cp} x DP {mesh.dp}, ZeRO {parallel.zero}, {config.train.precision}"
        )

    def _open_tracker(self, stack: contextlib.ExitStack) -> Tracker | NoTracker:
        tracking = self.config.tracking
        if not (self.first and tracking.enabled):
            return NoTracker()
        tracker = Tracker.open(
            self.folder.path,
            experiment=tracking.experiment,
            run_name=self.config.name,
            uri=tracking.uri,
            queue_size=tracking.queue,
        )

        self.timeline.tracker = tracker

        def close(kind: Any, error: Any, trace: Any) -> None:
            tracker.close(status=self.status if kind is None else "FAILED")
            if tracker.problem:
                self.say(f"tracking: {tracker.spooled:,} bytes not shipped: {tracker.problem}")

        stack.push(close)
        return tracker

    def _origin(self, state: TrainState) -> str | None:
        """Return what became of model.init_from."""
        if self.inputs.start is not None:
            return describe_start(self.inputs.start, self.built.model)
        if self.config.model.init_from is None:
            return None
        return (
            f"model.init_from={self.config.model.init_from} is not read: this run goes on from its"
            f" own step {state.step}; --fresh begins again from there"
        )

    def _spread(self, state: TrainState) -> dict[str, float]:
        """Return how unevenly the ranks work, and say who is slow; all ranks call it together."""
        if self.mesh.world_size == 1:
            return {}
        spread = self.stragglers.compare()
        if (text := self.stragglers.news(spread)) is not None:
            self.progress.say(text)
            self.timeline.add("straggler", state.step, text, {"rank": spread.slowest})
        return {"straggler/ratio": spread.ratio, "straggler/rank": float(spread.slowest)}

    def _held(self) -> int | None:
        """Return the most bytes this rank's GPU held; None on a CPU."""
        if self.mesh.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.mesh.device)


def memory_norms(state: TrainState) -> dict[str, float]:
    """Return the root mean square of each kind of memory tensor, over layers: does it grow?"""
    squares: dict[str, list[float]] = {}
    for name, tensor in named_tensors(compact(state.memory.get(0, [])), "memory").items():
        if tensor.is_floating_point() and tensor.numel():
            # memory/layers/3/parts/fam/slots is fam_slots, memory/stack/bank is bank
            words = [word for word in name.split("/")[2:] if word != "parts" and not word.isdigit()]
            kind = "memory/rms_" + "_".join(words)
            squares.setdefault(kind, []).append(tensor.float().square().mean().item())
    return {kind: math.sqrt(sum(values) / len(values)) for kind, values in squares.items()}
