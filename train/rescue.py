"""What is done about a bad step: named, skipped, rolled back, or the end of the run."""

from __future__ import annotations

from collections.abc import Callable

from data.ledger import Skip
from train.guard import Guard, Trouble
from train.loop import StepResult, TrainState
from train.settings.config import Config
from train.starting.resume import RunFolder
from train.tracking.timeline import Kind, Timeline


class Rescue:
    """Applies train.guard and train.max_nonfinite; all ranks call `attend` together."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        guard: Guard,
        timeline: Timeline,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.folder, self.guard = config, folder, guard
        self.timeline, self.say = timeline, say

    def attend(self, state: TrainState, result: StepResult) -> None:
        """Do what is configured about a step's trouble, if it has one.

        Raises FloatingPointError on all ranks where the run must stop.
        """
        if result.trouble is None:
            return
        what = f"{_describe(result, self.guard)}, {self._samples(state.step - 1, state.step)}"
        if result.grad_norm is not None:
            self._tell("spike", state, f"step {state.step}: {what}; it was trained on")
            return
        rolled_back = self._policy(result.trouble) == "rollback" and self._roll_back(state, what)
        if not rolled_back:
            self._skip(state, what)

    def _policy(self, trouble: Trouble) -> str:
        section = self.guard.section
        return section.spike if trouble == "spike" else section.nonfinite

    def _skip(self, state: TrainState, what: str) -> None:
        self._tell("skipped", state, f"step {state.step} skipped: {what}; {state.skipped} in a row")
        lanes, step = self.config.train.batch_size, state.step
        self.folder.ledger.skip(Skip((step - 1) * lanes, step * lanes, f"step {step}: {what}"))
        limit = max(1, self.config.train.max_nonfinite)
        if state.skipped < limit:
            return
        self.folder.save_now(state)
        raise FloatingPointError(
            f"{state.skipped} steps in a row were skipped (train.max_nonfinite="
            f"{self.config.train.max_nonfinite}), the last: {what}; lower train.lr, look at those"
            " samples, or set train.guard to roll back. Weights are those before these steps, saved"
            f" at step {state.step}"
        )

    def _roll_back(self, state: TrainState, what: str) -> bool:
        """Return whether there was a checkpoint to go back to."""
        step, limit = state.step, self.guard.section.max_rollbacks
        every = self.config.checkpoint.every
        if step - state.rolled_back >= every:  # what was gained since is in a checkpoint
            state.rollbacks = 0
        if state.rollbacks >= limit:
            raise FloatingPointError(
                f"step {step}: {what}, after {state.rollbacks} rollbacks, each less than"
                f" checkpoint.every={every} steps after the one before"
                f" (train.guard.max_rollbacks={limit}); lower train.lr, or look at those samples."
                " The newest checkpoint has the weights from before"
            )
        back = self.folder.roll_back(state, self.say)
        if back is None:
            return False
        state.rollbacks, state.rolled_back = state.rollbacks + 1, step
        lanes = self.config.train.batch_size
        text = (
            f"step {step}: {what}; rolled back to the weights of step {back}, going past"
            f" {self._samples(back, step)}"
        )
        self.folder.ledger.skip(Skip(back * lanes, step * lanes, text))
        self.guard.losses.clear()
        self.guard.losses.extend(self.folder.losses())
        self.folder.save_now(state)  # or a kill would do it all again, and forget the count
        self._tell("rolled_back", state, text, {"to": back})
        return True

    def _samples(self, done: int, step: int) -> str:
        """Return the samples of the steps after `done` up to `step`."""
        lanes = self.config.train.batch_size
        return f"samples {done * lanes} to {step * lanes - 1}"

    def _tell(
        self, kind: Kind, state: TrainState, text: str, facts: dict[str, int] | None = None
    ) -> None:
        self.say(text)
        self.timeline.add(kind, state.step, text, facts)


def _describe(result: StepResult, guard: Guard) -> str:
    if result.trouble == "spike":
        return f"loss {result.loss:.4g} is a spike (limit {guard.limit():.4g})"
    if result.trouble == "loss":
        return f"loss not finite ({result.loss})"
    return f"gradient not finite (loss {result.loss:.4g})"
