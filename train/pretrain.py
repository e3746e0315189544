"""`longhaul pretrain`: from a checked configuration to a finished, or stopped, run."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import sys
import time
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from data.loader import load
from data.packing import PackedStreams
from data.streams import Streams
from model.config import ModelConfig
from model.memory.base import named_tensors
from parallel.mesh import Mesh, build_mesh, start_processes
from train.build import Built, build, to_model_config
from train.cluster.failure import tell_launcher, tell_stopped
from train.cluster.lead import LeadTime
from train.corpora import Course, start_course
from train.evaluation.held_out import HeldOut, count_parameters, count_trained
from train.guard import Guard
from train.ledger import open_ledger
from train.loop import StepResult, TrainState, train_steps
from train.metrics import FORMULA, FORMULA_NAME, mfu, peak_flops, training_flops_per_token
from train.reading import choose_reading, model_vocab_size
from train.rescue import Rescue
from train.settings.config import Config, dump
from train.signals import StopAgreed, StopRequest
from train.starting.fork import read_parent
from train.starting.init_from import Start, describe_start, take_weights, verify_together
from train.starting.inputs import Inputs
from train.starting.provenance import is_ours
from train.starting.resume import RunFolder
from train.starting.start import agree_on, open_run
from train.tracking.describe import describe_run
from train.tracking.progress import Progress, Status
from train.tracking.summary import plot, summarise
from train.tracking.tracker import NoTracker, Tracker
from train.tracking.tracker import Status as EndStatus
from train.watch.attempt import Watch, limits_of
from train.watch.pulse import Pulse, follow_layers
from train.watch.stragglers import Stragglers


def run(config: Config, *, fresh: bool, stop: StopRequest, fork: str | None = None) -> int:
    """Train until the last step or a stop signal; return the exit code.

    fresh: begin again; an old run folder gets another name. fork: the name of a run that begins
    from this one's newest checkpoint.
    Raises ConfigError, before any rank waits for another, where data or checkpoint do not fit.
    """
    config, inputs = open_run(config, fresh=fresh, fork=fork)
    # Behind the watchdog's: torch's own end a rank without saying where it was.
    timeout = timedelta(seconds=limits_of(config).backstop_s(Pulse()))
    start_processes(timeout)
    agree_on(config)
    watch = Watch(config)
    try:
        with watch.running():
            _attempt(config, inputs, stop, watch, timeout)
    except Exception as error:
        watch.note_failure(error, 0)
        if isinstance(error, ValueError) and is_ours(error):
            raise  # it says what to do, and the command line prints nothing else
        tell_launcher(error)
        traceback.print_exc()
        print(watch.last_words(config, error, continue_command()), file=sys.stderr, flush=True)
        return 1
    # Only after success: after one rank's error NCCL would wait here for ranks that wait elsewhere,
    # and hide the error until the timeout.
    dist.destroy_process_group()
    return 0


def _attempt(
    config: Config, inputs: Inputs, stop: StopRequest, watch: Watch, timeout: timedelta
) -> None:
    mesh = build_mesh(tp=config.parallel.tp, cp=config.parallel.cp, timeout=timeout)
    torch.manual_seed(config.seed)
    course = start_course(config, inputs.train)
    vocab_size = model_vocab_size(config, inputs.train.vocab_size)
    model_config = to_model_config(config, vocab_size)
    built = build_from(inputs.start, config, model_config, mesh)
    follow_layers(built.model.blocks, watch.pulse)
    Pretraining(config, inputs, course, built, mesh, stop, watch).run()


def build_from(start: Start | None, config: Config, model_config: ModelConfig, mesh: Mesh) -> Built:
    """Return the model with initial weights, or those of a checkpoint to start from."""
    if start is None:
        return build(config, model_config, mesh)
    verify_together(config, start)
    return build(config, model_config, mesh, lambda model: take_weights(model, start, mesh))


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
        self.mesh, self.stop, self.first = mesh, stop, mesh.rank == 0
        self.watch, self.timeline, self.pulse = watch, watch.timeline, watch.pulse
        self.folder = RunFolder(
            config, built, mesh, inputs.train.fingerprint, timeout_s=watch.backstop_s
        )
        self.stragglers = Stragglers(watch.nodes, watch.waiting, mesh.device)
        self.tokens_per_step = config.train.batch_size * config.data.sample_len
        self.flops = training_flops_per_token(
            built.model.config,
            config.data.segment_len,
            keys_per_token(course.streams, built.model.config.window),
        )
        self.peak = peak_flops(mesh.device, config.train.precision)
        self.status: EndStatus = "FINISHED"
        self.lead = LeadTime(config.run_dir)
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
        state = self.folder.resume(self._say)
        self.step = state.step
        position = state.step * config.train.batch_size
        data = self.inputs.train.fingerprint
        self.folder.ledger = open_ledger(config, self.mesh, position, data)
        self.progress = stack.enter_context(
            Progress(
                config.train.steps,
                first=state.step,
                log_every=config.train.log_every,
                ranks=self.mesh.world_size,
                shown=self.first,
            )
        )
        self.tracker = self._open_tracker(stack)
        self.held_out = self._open_held_out()
        guard = Guard(config.train.guard, self.folder.losses())
        self.rescue = Rescue(config, self.folder, guard, self.timeline, self.progress.say)
        self._announce(state)
        finished = self._train(state, guard)
        self.pulse.enter("save", state.step)
        self.folder.save_now(state)
        self.folder.ledger.close()  # not after an error: a save may still run beside it
        self._tell_saved()
        if not (finished and self._finish(state)):
            self.status = "SCHEDULED"
            by = self.stop.received or "another rank"
            tell_stopped(by)
            self.timeline.add("preempted", state.step, f"stopped by {by}")
            self.progress.say(
                f"stopped at step {state.step}, saved; continue with: {continue_command()}"
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
            began = time.perf_counter()
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
                self._record(state, result, now - began)
                self.rescue.attend(state, result)
                self.watch.stretch()
                # after a rollback, and after a stop by a bad step, it is saved already
                if state.step % config.checkpoint.every == 0 and self.folder.saved_at != state.step:
                    self._save(state)
                self._tell_saved()
                if state.step == config.train.steps:
                    break  # the last evaluation is `_finish`'s
                every = config.train.eval_every
                if every and state.step % every == 0 and not self._evaluate(state.step):
                    return False
                began = time.perf_counter()
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
        return True

    def _record(self, state: TrainState, result: StepResult, seconds: float) -> None:
        tokens_per_s = self.tokens_per_step / seconds
        used = mfu(tokens_per_s, self.flops, self.peak, self.mesh.world_size)
        row = {
            "step": state.step,
            "loss": result.loss,
            "grad_norm": math.nan if result.grad_norm is None else result.grad_norm,
            "lr": result.lr,
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
            self.tracker.metrics(metrics, state.step)
        self.progress.update(
            state.step,
            Status(result.loss, result.grad_norm, result.lr, tokens_per_s, used, self._held()),
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

    def _say(self, text: str) -> None:
        if self.first:
            print(text, file=sys.stderr, flush=True)

    def _save(self, state: TrainState) -> None:
        self.pulse.enter("save", state.step)
        began = time.perf_counter()
        state.rollbacks = 0
        self.folder.save(state)
        self.tracker.metrics({"save_stall_s": time.perf_counter() - began}, state.step)

    def _tell_saved(self) -> None:
        """Say how a save ended, once it has."""
        save = self.folder.saver.news()
        if save is None:
            return
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

    def _finish(self, state: TrainState) -> bool:
        """Evaluate and sum up; return False where the ranks were asked to stop before."""
        self.pulse.enter("finish", state.step)
        held_out = self.held_out
        try:
            evaluation = held_out.evaluate(state.step, compare=True) if held_out else None
        except StopAgreed:
            return False
        if not self.first:
            return True
        history = self.folder.history()
        picture = plot(
            self.folder.path, history=history, evaluation=evaluation, title=self._title()
        )
        self.tracker.artifact(picture)
        if held_out is not None and evaluation is not None:
            held_out.report(state.step, evaluation, self._title(), self.folder.path)
        self.folder.finish()
        self.timeline.add("finished", state.step, f"finished at step {state.step}")
        text = summarise(
            self.folder.path,
            history=history,
            evaluation=evaluation,
            formula=FORMULA_NAME,
            peak_source=self.peak.source,
            checkpoint=self.folder.checkpoints / f"step-{state.step:08d}",
            tracking=self.tracker.uri if isinstance(self.tracker, Tracker) else "off",
            continue_command=continue_command(steps=2 * self.config.train.steps),
        )
        self.progress.say(text)
        return True

    def _open_held_out(self) -> HeldOut | None:
        if self.inputs.valid is None:
            return None
        shared = (self.inputs.valid, self.built, self.mesh, self.tracker, self.progress.say)
        return HeldOut(self.config, *shared, lambda: self.stop.check(self.mesh.device))

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
                self._say(f"tracking: {tracker.spooled:,} bytes not shipped: {tracker.problem}")

        stack.push(close)
        return tracker

    def _announce(self, state: TrainState) -> None:
        """Say what runs, and write it down."""
        if not self.first:
            return
        config, mesh = self.config, self.mesh
        self.folder.path.mkdir(parents=True, exist_ok=True)
        parameters, trained = count_parameters(self.built), count_trained(self.built)
        some = f", {trained / 1e6:.2f}M of them trained" if trained < parameters else ""
        self.progress.say(
            f"{self._title()} | {mesh.world_size} ranks on {mesh.device.type}"
            f" | {parameters / 1e6:.2f}M parameters a TP rank{some}"
            f" | {self.tokens_per_step:,} tokens a step | peak {self.peak.source}"
        )
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
        if (origin := read_parent(self.folder.path)) is not None:
            self.tracker.tags({f"parent.{name}": value for name, value in origin.items()})
        self.watch.note_start(state.step)
        if text := self._origin(state):
            self.progress.say(text)
            self.tracker.event(text, state.step)

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

    def _title(self) -> str:
        config, mesh = self.config, self.mesh
        parallel = config.parallel
        scattered = "+SP" if parallel.sequence_parallel and mesh.tp > 1 else ""
        return (
            f"{config.name}: memory {config.model.memory.name}, TP {mesh.tp}{scattered} x CP"
            f" {mesh.cp} x DP {mesh.dp}, ZeRO {parallel.zero}, {config.train.precision}"
        )


def keys_per_token(streams: Streams, window: int) -> float | None:
    """Return the mean of keys read by attention where segments are packed; None: whole segments."""
    return streams.keys_per_token(window) if isinstance(streams, PackedStreams) else None


def memory_norms(state: TrainState) -> dict[str, float]:
    """Return the root mean square of each kind of memory tensor, over layers: does it grow?"""
    squares: dict[str, list[float]] = {}
    for name, tensor in named_tensors(state.memory.get(0, []), "memory").items():
        if tensor.is_floating_point() and tensor.numel():
            # memory/layers/3/parts/fam/slots is fam_slots, memory/stack/bank is bank
            words = [word for word in name.split("/")[2:] if word != "parts" and not word.isdigit()]
            kind = "memory/rms_" + "_".join(words)
            squares.setdefault(kind, []).append(tensor.float().square().mean().item())
    return {kind: math.sqrt(sum(values) / len(values)) for kind, values in squares.items()}


def continue_command(steps: int | None = None) -> str:
    """Return the command line that goes on with this run, with more steps if given."""
    words = ["longhaul", *sys.argv[1:]]
    if job := os.environ.get("SLURM_JOB_NAME"):
        words = ["sbatch", os.environ.get("JOB_SCRIPT", f"slurm/{job}.sh"), *sys.argv[3:]]
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local is not None and words[0] == "longhaul":
        one_node = ["--standalone"] if local == os.environ.get("WORLD_SIZE") else []
        words = ["torchrun", *one_node, "--no-python", "--nproc-per-node", local, *words]
    if steps is not None:
        words = [word for word in words if not word.startswith("train.steps=")]
        words.append(f"train.steps={steps}")
    return shlex.join(word for word in words if word != "--fresh")
