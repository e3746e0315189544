"""Saves a checkpoint beside training: every rank its own share, nobody the model.

Training waits for the copy to host memory. A thread writes and hashes the copy, the ranks' threads
agree over a group of their own, and rank 0 commits. A kill at any moment leaves the checkpoints
that were complete, and a temporary folder that the next attempt removes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.wording import counted
from train.agree import SomeRankFailed, of_all, of_first, together
from train.checkpoints.folder import Manifest, begin, commit, share_name
from train.checkpoints.names import step_name
from train.checkpoints.tensor_file import specs_of, write_tensors

T = TypeVar("T")

RETRY_AFTER_S = (1.0, 5.0, 20.0, 40.0)
"""A disk that refuses is tried again after so long; then this save has failed."""


class Result(NamedTuple):
    """How a save ended, the same on all ranks."""

    step: int
    path: Path
    nbytes: int  # of this rank's share
    seconds: float  # from the copy's end
    error: str | None


class Saver:
    """Writes one checkpoint at a time into a folder."""

    def __init__(
        self,
        folder: Path,
        *,
        timeout: timedelta,
        max_failures: int,
        say: Callable[[str], None],
        committed: Callable[[], None] = lambda: None,
        sync: Callable[[], None] = lambda: None,
    ) -> None:
        """All ranks call this together. committed: called on rank 0 after each commit.

        sync: called on every rank before a commit, for what must be on disk by then.
        """
        self.folder, self.max_failures, self.say = folder, max_failures, say
        self.committed, self.sync = committed, sync
        # Its own group, on the host: a save's messages meet none of training's.
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.rank, self.failures = dist.get_rank(), 0
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._result: Result | None = None
        self._untold: deque[Result] = deque()

    def start(self, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
        """Copy this rank's tensors and write them beside training.

        manifest: but for its files. All ranks call this together. Waits for the save before; raises
        what `finish` raises.
        """
        self.finish()
        self._copies = self._copied(tensors)
        # A daemon: a write that hangs must not keep a failed process from ending.
        self._thread = threading.Thread(target=self._save, args=(manifest,), daemon=True)
        self._thread.start()

    def finish(self) -> Result | None:
        """Wait for the running save, if any, and return how it ended.

        Raises OSError on all ranks after max_failures failures in a row.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        result, self._result = self._result, None
        assert result is not None
        self.failures = 0 if result.error is None else self.failures + 1
        if self.failures >= self.max_failures:
            raise OSError(
                f"{counted(self.failures, 'checkpoint')} in a row could not be saved"
                f" (checkpoint.max_failures={self.max_failures}): {result.error}"
            )
        return result

    def news(self) -> Result | None:
        """Return how a save ended, each once, as soon as it has; never waits."""
        return self._untold.popleft() if self._untold else None

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies on the host, in the memory of the last ones where they fit."""
        copies = {}
        on_gpu = False
        for name, tensor in tensors.items():
            copy = self._copies.pop(name, None)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
            on_gpu = on_gpu or tensor.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _save(self, manifest: Manifest) -> None:
        began, error, nbytes = time.perf_counter(), None, 0
        path = self.folder / step_name(manifest.step)
        try:
            nbytes = self._write(manifest)
        except SomeRankFailed as failed:
            error = f"checkpoint not saved: {failed}"
        except Exception as problem:  # a thread's error is seen by nobody else
            error = str(problem) or type(problem).__name__
        self._result = Result(manifest.step, path, nbytes, time.perf_counter() - began, error)
        self._untold.append(self._result)

    def _write(self, manifest: Manifest) -> int:
        """Write, agree and commit; return the bytes of this rank's share."""
        work = of_first(self._patient(lambda: begin(self.folder, manifest.step)), self.group)
        path = work / share_name(self.rank)

        def write() -> dict[str, Any]:
            self.sync()
            digest = write_tensors(path, specs_of(self._copies), self._copies.__getitem__)
            return {"sha256": digest, "bytes": path.stat().st_size}

        mine = together(self._patient(write), self.group)
        files = dict(of_all((path.name, mine), self.group))
        of_first(self._patient(lambda: commit(work, replace(manifest, files=files))), self.group)
        if self.rank == 0:
            self._tidy()
        size: int = mine["bytes"]
        return size

    def _tidy(self) -> None:
        """Do what follows a commit; the checkpoint is there, whatever becomes of that."""
        try:
            self.committed()
        except Exception as error:
            self.say(f"after a checkpoint: {str(error) or type(error).__name__}")

    def _patient(self, action: Callable[[], T]) -> Callable[[], T]:
        """Return the action that is tried again where the disk refuses."""

        def act() -> T:
            for wait_s in RETRY_AFTER_S:
                try:
                    return action()
                except OSError as error:
                    self.say(f"checkpoint, rank {self.rank}: {error}; again in {wait_s:.0f} s")
                    time.sleep(wait_s)
            return action()

        return act
