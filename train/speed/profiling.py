"""Where a step's time goes: traces of chosen steps and ranks, what memory held when it ran out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from train.settings.profile import ProfileSection
from train.watch.last_words import out_of_memory

FOLDER = "profiles"
_ROWS = 40
_HISTORY = 100_000
"""Allocations that are remembered."""


class Traces:
    """Traces this rank's chosen steps into the run folder, if it has any.

    Each trace is a file for Perfetto, step-00010-rank-0.json.gz, and a table of the operations that
    took most, .txt.
    """

    def __init__(
        self,
        section: ProfileSection,
        run_dir: Path,
        rank: int,
        blocks: nn.ModuleList,
        written: Callable[[Path], None],
    ) -> None:
        """written: told of each file. blocks: whose layers are named in the trace."""
        self.section, self.rank, self.written = section, rank, written
        self.folder, self.blocks = run_dir / FOLDER, blocks
        self._first = section.first if rank in section.ranks else None
        self._last = (section.first or 0) + section.steps - 1
        self._trace: profile | None = None
        self._hooks: list[Any] = []
        if section.memory and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)

    def before(self, step: int) -> None:
        """Begin the trace, if this step, counted from 1, is the first of it."""
        if step != self._first:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._hooks = _name_layers(self.blocks)
        self._trace = profile(
            activities=activities, record_shapes=True, profile_memory=self.section.memory
        )
        self._trace.start()

    def after(self, step: int) -> None:
        """End the trace, if this step is the last of it."""
        if self._trace is None or step < self._last:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        for hook in self._hooks:
            hook.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{self._first:05d}-rank-{self.rank}"
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self.folder / f"{name}.txt"
        table.write_text(trace.key_averages().table(sort_by=by, row_limit=_ROWS))
        trace.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
        self.written(self.folder / f"{name}.json.gz")
        self.written(table)


def snapshot_memory(error: BaseException, run_dir: Path, rank: int) -> None:
    """Write what a GPU's memory holds, where an error says that it ran out, and say where.

    The file is for https://pytorch.org/memory_viz.
    """
    if not (out_of_memory(error) and torch.cuda.is_available()):
        return
    path = run_dir / FOLDER / f"out-of-memory-rank-{rank}.pickle"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        print(f"what memory held: {path}", file=sys.stderr, flush=True)


def _name_layers(blocks: nn.ModuleList) -> list[Any]:
    """Let each layer's forward be a range of the trace; return the hooks."""
    hooks: list[Any] = []
    for number, block in enumerate(blocks):
        open_ranges: list[record_function] = []

        def begin(
            module: nn.Module, args: Any, name: str = f"layer {number}", ranges: Any = open_ranges
        ) -> None:
            ranges.append(record_function(name).__enter__())

        def end(module: nn.Module, args: Any, output: Any, ranges: Any = open_ranges) -> None:
            ranges.pop().__exit__(None, None, None)

        hooks += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    return hooks
