"""`longhaul pretrain`: from a checked configuration to a finished, or stopped, run."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data.loader import load
from model.config import ModelConfig
from parallel.mesh import Mesh, build_mesh, start_processes
from train.agree import of_first
from train.build import Built, build, to_model_config
from train.cluster.failure import tell_launcher, tell_stopped
from train.evaluation.held_out import HeldOut
from train.guard import Guard
from train.loop import OtherDataError, TrainState, train_steps
from train.planning.expect import expect, gpu_name
from train.reading.corpora import Course, start_course
from train.reading.landmarks import choose_reading, model_vocab_size
from train.reading.ledger import open_ledger
from train.reporting import Reporter
from train.rescue import Rescue
from train.settings.config import Config
from train.signals import StopAgreed, StopRequest
from train.speed.profiling import Traces, snapshot_memory
from train.speed.ranges import NvtxRanges, name_parts
from train.starting.again import continue_command, nothing_left
from train.starting.init_from import Start, take_weights, verify_start
from train.starting.inputs import Inputs
from train.starting.provenance import is_ours
from train.starting.resume import RunFolder
from train.starting.start import agree_on, open_run
from train.tracking.timeline import read_events
from train.watch.attempt import Watch, limits_of
from train.watch.pulse import Pulse, follow_layers, follow_segments


def run(config: Config, *, fresh: bool, stop: StopRequest, fork: str | None = None) -> int:
    """Train until the last step or a stop signal; return the exit code.

    fresh: begin again; an old run folder gets another name. fork: the name of a run that begins
    from this one's newest checkpoint.
    Raises ConfigError, before any rank waits for another, where data or checkpoint do not fit.
    """
    config, inputs = open_run(config, fresh=fresh, fork=fork)
    # Behind the watchdog's: torch's own end a rank without saying where it was.
    timeout = timedelta(seconds=limits_of(config).backstop_s(Pulse()))
    start_processes(timeout, tight_heap=config.train.ffn_chunk is not None)
    agree_on(config, inputs)
    vocab_size = model_vocab_size(config, inputs.train.vocab_size)
    watch = Watch(config, expect(config, vocab_size, dist.get_world_size(), gpu_name()))
    try:
        with watch.running():
            _attempt(config, inputs, stop, watch)
    except Exception as error:
        watch.note_failure(error, 0)
        if isinstance(error, ValueError) and is_ours(error):
            raise  # it says what to do, and the command line prints nothing else
        tell_launcher(error)
        traceback.print_exc()
        snapshot_memory(error, config.run_dir, dist.get_rank())
        print(watch.last_words(config, error, continue_command()), file=sys.stderr, flush=True)
        return 1
    # Only after success: after one rank's error NCCL would wait here for ranks that wait elsewhere,
    # and hide the error until the timeout.
    dist.destroy_process_group()
    return 0


def _attempt(config: Config, inputs: Inputs, stop: StopRequest, watch: Watch) -> None:
    timeout = timedelta(seconds=watch.backstop_s)
    mesh = build_mesh(tp=config.parallel.tp, cp=config.parallel.cp, timeout=timeout)
    torch.manual_seed(config.seed)
    course = start_course(config, inputs.train)
    vocab_size = model_vocab_size(config, inputs.train.vocab_size)
    model_config = to_model_config(config, vocab_size)
    built = build_from(inputs.start, config, model_config, mesh)
    follow_layers(built.model.blocks, watch.pulse)
    follow_segments(built.model.memory, watch.pulse)
    Pretraining(config, inputs, course, built, mesh, stop, watch).run()


def build_from(start: Start | None, config: Config, model_config: ModelConfig, mesh: Mesh) -> Built:
    """Return the model with initial weights, or those of a checkpoint to start from."""
    if start is None:
        return build(config, model_config, mesh)
    verify_start(config, start)
    return build(config, model_config, mesh, lambda model: take_weights(model, start, mesh))


def was_finished(run_dir: Path, step: int) -> bool:
    """Return whether an attempt before this one finished the run at this step."""
    return any((e["kind"], e["step"]) == ("finished", step) for e in read_events(run_dir))


class Pretraining:
    """One attempt at a run: what its parts share while it lasts."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        course: Course,
        built: Built,
        mesh: Mesh,
        stop: StopRequest,
        watch: Watch,
    ) -> None:
        self.config, self.inputs, self.course, self.built = config, inputs, course, built
        self.mesh, self.stop = mesh, stop
        self.watch, self.timeline, self.pulse = watch, watch.timeline, watch.pulse
        self.folder = RunFolder(config, built, mesh, inputs.train, timeout_s=watch.backstop_s)
        self.reporter = Reporter(config, inputs, course, built, mesh, watch, self.folder)
        self.step = 0  # done, for whoever asks after an error

    def run(self) -> None:
        """Resume, train, evaluate, sum up; the checkpoint of the last step is always written."""
        with contextlib.ExitStack() as stack:
            try:
                self._run(stack)
            except Exception as error:
                self.watch.note_failure(error, self.step)  # before the tracker closes
                raise

    def _run(self, stack: contextlib.ExitStack) -> None:
        config = self.config
        self.pulse.enter("resume", 0)
        state = self.folder.resume(self.reporter.say)
        self.step = state.step
        if self._is_over(state.step):
            return
        position = state.step * config.train.batch_size
        data = self.inputs.train.fingerprint
        self.folder.ledger = open_ledger(config, self.mesh, position, data)
        self.reporter.open(stack, state.step)
        self.held_out = self._open_held_out()
        guard = Guard(config.train.guard, self.folder.losses())
        self.rescue = Rescue(config, self.folder, guard, self.timeline, self.reporter.progress.say)
        self.reporter.announce(state)
        self.traces = self._open_traces()
        try:
            finished = self._train(state, guard)
        except OtherDataError:
            self.reporter.left_out(state.step + 1)  # it names the file
            raise
        self.reporter.left_out(state.step)
        self.pulse.enter("save", state.step)
        self.folder.save_now(state)
        self.folder.ledger.close()  # not after an error: a save may still run beside it
        self.reporter.saved()
        if not (finished and self._finish(state)):
            self.reporter.status = "SCHEDULED"
            by = self.stop.received or "another rank"
            tell_stopped(by)
            self.timeline.add("preempted", state.step, f"stopped by {by}")
            self.reporter.progress.say(
                f"stopped at step {state.step}, saved; continue with: {continue_command()}"
            )

    def _is_over(self, step: int) -> bool:
        """Say and return whether not even an evaluation is left to do, as a finished run has it."""
        steps = self.config.train.steps
        if step < steps:
            return False
        # The timeline says it; DONE does not, for a job deletes it when it begins.
        if step == steps and not of_first(lambda: was_finished(self.config.run_dir, step)):
            return False
        self.reporter.say(nothing_left(self.config.run_dir, step, steps))
        if self.mesh.rank == 0:
            self.folder.finish(step)  # or a job would start it again and again
        return True

    def _open_traces(self) -> Traces:
        profile = self.config.train.profile
        if profile.nvtx and self.mesh.device.type == "cuda":
            ranges = NvtxRanges()
            self.pulse.mark = ranges.begin
            name_parts(self.built.model, self.built.engine, ranges)
        return Traces(
            profile,
            self.config.run_dir,
            self.mesh.rank,
            self.built.model.blocks,
            self.reporter.traced,
        )

    def _train(self, state: TrainState, guard: Guard) -> bool:
        """Train; return whether every step is done (else: asked to stop)."""
        config = self.config
        reading = choose_reading(config, self.built.model.config.vocab_size)
        steps = max(0, config.train.steps - state.step)
        if self.folder.owes_evaluation(state.step) and not self._evaluate(state.step):
            return False
        with contextlib.closing(
            load(
                self.inputs.train,
                self.course.streams,
                position=state.step * config.train.batch_size,
                dp_rank=self.mesh.dp_rank,
                dp_size=self.mesh.dp,
                micro_batch=config.train.micro_batch,
                workers=config.data.workers,
                steps=steps,
                stopped=self.stop.asked,
            )
        ) as batches:
            self.traces.before(state.step + 1)
            began = self.reporter.begin_step()
            agreed = self.stop.until_agreed(batches, steps, self.mesh.device)
            read = self.folder.ledger.recording(
                [reading.prepare(batch) for batch in step] for step in agreed
            )
            results = train_steps(
                config, self.built, self.mesh, state, read, guard=guard, pulse=self.pulse
            )
            for result in results:
                self.step = state.step
                now = time.perf_counter()
                self.traces.after(state.step)
                self.reporter.step(state, result, now - began)
                if result.trouble is not None:
                    self.pulse.enter("save", state.step)  # a rollback reads and writes one
                self.rescue.attend(state, result)
                self.watch.stretch()
                # after a rollback, and after a stop by a bad step, it is saved already
                if state.step % config.checkpoint.every == 0 and self.folder.saved_at != state.step:
                    self._save(state)
                self.reporter.saved()
                if state.step == config.train.steps:
                    break  # the last evaluation is `_finish`'s
                every = config.train.eval_every
                if every and state.step % every == 0 and not self._evaluate(state.step):
                    return False
                self.traces.before(state.step + 1)
                began = self.reporter.begin_step()
        return state.step >= config.train.steps

    def _evaluate(self, step: int) -> bool:
        """Evaluate; return False where the ranks were asked to stop: the next attempt does it."""
        if self.held_out is None:
            return True
        self.pulse.enter("evaluate", step)
        try:
            self.held_out.evaluate(step, compare=self.config.train.eval_compare)
        except StopAgreed:
            self.folder.owe_evaluation(step)
            return False
        self.folder.evaluated()
        return True

    def _save(self, state: TrainState) -> None:
        self.pulse.enter("save", state.step)
        began = time.perf_counter()
        self.folder.save(state)
        self.reporter.tracker.metrics({"save_stall_s": time.perf_counter() - began}, state.step)

    def _finish(self, state: TrainState) -> bool:
        """Evaluate and sum up; return False where the ranks were asked to stop before."""
        self.pulse.enter("finish", state.step)
        held_out = self.held_out
        try:
            evaluation = held_out.evaluate(state.step, compare=True) if held_out else None
        except StopAgreed:
            return False
        self.reporter.finished(state, evaluation)
        return True

    def _open_held_out(self) -> HeldOut | None:
        if self.inputs.valid is None:
            return None
        return HeldOut(
            self.config,
            self.inputs.valid,
            self.built,
            self.mesh,
            self.reporter.tracker,
            self.reporter.progress.say,
            lambda: self.stop.check(self.mesh.device),
            questions=self.inputs.questions,
            title=self.reporter.title,
            folder=self.folder.path,
        )
