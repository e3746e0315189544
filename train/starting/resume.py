"""The run folder: what a run leaves there, and how the next attempt goes on from it.

config.yaml      resolved configuration        log.jsonl   one row a step
checkpoints/     sharded, verified             tracking/   MLflow's spool and embedded store
summary.png      the end of the run            DONE        written when all steps are done
ledger/          which samples were consumed   events.jsonl  what happened when, over all attempts
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from data.documents import Documents
from data.durable import write_atomically
from data.ledger import Ledger, NoLedger
from parallel.mesh import Mesh
from train.agree import of_first
from train.build import Built
from train.checkpoints import folder as checkpoint
from train.checkpoints import snapshot
from train.checkpoints.saver import Saver
from train.checkpoints.stored import Stored
from train.loop import TrainState
from train.settings.config import Config
from train.starting.changes import find_changes
from train.starting.fork_name import read_parent
from train.tracking.rows import RowFile, read_rows

OWED = "evaluation_owed"
"""Holds the step whose evaluation a stop cut short."""


class RunFolder:
    """A run's folder, seen by one rank; only rank 0 writes what is not a share."""

    def __init__(
        self,
        config: Config,
        built: Built,
        mesh: Mesh,
        data: Documents,
        *,
        timeout_s: float | None = None,
    ) -> None:
        """timeout_s: how long a save's messages wait for a rank; parallel.timeout_s."""
        self.config, self.built, self.mesh, self.data = config, built, mesh, data
        self.path, self.checkpoints = config.run_dir, config.run_dir / "checkpoints"
        self.saved_at: int | None = None  # the newest step that is saved or being saved
        self.parent = read_parent(config.run_dir)
        self._rows = RowFile(self.path / "log.jsonl")
        self.ledger: Ledger | NoLedger = NoLedger()
        self.saver = Saver(
            self.checkpoints,
            timeout=timedelta(seconds=timeout_s or config.parallel.timeout_s),
            max_failures=config.checkpoint.max_failures,
            say=lambda text: print(text, file=sys.stderr, flush=True),
            committed=self._retain,
            sync=lambda: self.ledger.sync(),
        )

    def resume(self, say: Callable[[str], None]) -> TrainState:
        """Return the state of the newest good checkpoint, put back; without one a new state."""
        if self.mesh.rank == 0:
            for name in checkpoint.remove_unfinished(self.checkpoints):
                say(f"removed what an interrupted save left: {name}")
        dist.barrier()
        found = checkpoint.find_newest_good(self.checkpoints, say)
        if found is None:
            state = TrainState()
        else:
            path, manifest = found
            stored = Stored(path, manifest)
            state = snapshot.restore(self.built, self.mesh, self.config, stored, say)
            self.saved_at = state.step
            say(f"resumed at step {state.step} from {path}")
            for change in find_changes(self.config, manifest, self.built.model.config.vocab_size):
                say(f"changed since step {state.step}: {change}")
        if self.mesh.rank == 0:
            for aside in checkpoint.set_aside_after(self.checkpoints, state.step):
                say(f"set aside: {aside}; delete it when nobody needs to look at it")
            self._forget_rows_after(state.step)
        return state

    def roll_back(self, state: TrainState, say: Callable[[str], None]) -> int | None:
        """Take the weights of the newest good checkpoint; return its step, None without one.

        The state keeps its step: positions in the data are passed, never gone back to. Its memory
        is dropped, for it read what lies before the samples that are passed over. All ranks call
        this together.
        """
        self.wait()
        found = checkpoint.find_newest_good(self.checkpoints, say)
        if found is None:
            return None
        path, manifest = found
        stored = Stored(path, manifest)
        before = snapshot.restore(self.built, self.mesh, self.config, stored, say)
        if self.mesh.rank == 0:
            for aside in checkpoint.set_aside_after(self.checkpoints, before.step):
                say(f"set aside: {aside}; delete it when nobody needs to look at it")
            self._forget_rows_after(before.step)
        dist.barrier()
        state.updates, state.passed = before.updates, before.passed
        state.memory, state.skipped = {}, 0
        return before.step

    def losses(self) -> list[float]:
        """Return the losses of the steps that had an update, the same on all ranks."""
        return of_first(
            lambda: [row["loss"] for row in self.history() if math.isfinite(row["grad_norm"])]
        )

    def save(self, state: TrainState) -> None:
        """Copy every rank's share; it is written beside training, or now if so configured.

        Raises OSError after too many failures in a row.
        """
        tensors = snapshot.collect(self.built, self.mesh, state, self.config)
        manifest = snapshot.describe(
            self.config, self.built, self.mesh, state, self.data, self.parent
        )
        self.saver.start(tensors, manifest)
        self.saved_at = state.step
        if not self.config.checkpoint.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the running save has ended; one that failed does not count as saved."""
        result = self.saver.finish()
        if result is not None and result.error is not None:
            self.saved_at = None

    def save_now(self, state: TrainState) -> None:
        """Return when this state is saved, as it may be already; raises OSError where it cannot."""
        self.wait()
        if self.saved_at != state.step:
            self.save(state)
            self.wait()
        if self.saved_at != state.step:
            raise OSError(f"the checkpoint of step {state.step} could not be saved, see above")
        self._rows.flush()

    def _retain(self) -> None:
        kept = self.config.checkpoint
        checkpoint.retain(
            self.checkpoints, keep=kept.keep, keep_every=kept.keep_every, say=self.saver.say
        )

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to log.jsonl (rank 0); where it cannot be written now, with the next."""
        self._rows.add(row)

    def history(self) -> list[dict[str, Any]]:
        """Return the rows of log.jsonl; a last line cut short by a crash is left out."""
        return read_rows(self.path / "log.jsonl")

    def finish(self, step: int) -> None:
        """Write DONE: finished at this step, not only stopped (rank 0)."""
        self._rows.flush()
        write_atomically(self.path / "DONE", f"{step}\n")

    def owe_evaluation(self, step: int) -> None:
        """Write down that the evaluation after this step is still to be done."""
        if self.mesh.rank == 0:
            write_atomically(self.path / OWED, f"{step}\n")

    def owes_evaluation(self, step: int) -> bool:
        """Return whether an attempt before this one left out the evaluation after this step.

        All ranks call this together.
        """
        path = self.path / OWED
        return of_first(lambda: path.exists() and path.read_text() == f"{step}\n")

    def evaluated(self) -> None:
        """Write down that no evaluation is owed any longer."""
        if self.mesh.rank == 0:
            (self.path / OWED).unlink(missing_ok=True)

    def _forget_rows_after(self, step: int) -> None:
        """Drop rows of steps that will be done again."""
        self._rows.flush()
        rows = [row for row in self.history() if row["step"] <= step]
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        (self.path / "DONE").unlink(missing_ok=True)
