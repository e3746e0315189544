"""Where a rank is: written by training, at the price of an assignment, read by its watchdog."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from model.memory.in_turn import InTurn

RECENT_STEPS = 50
"""The limit follows the slowest of so many: a phase that is over is forgotten."""


class Place(NamedTuple):
    """Where a rank was at one moment; None: not there, or not known."""

    phase: str
    step: int  # the one being done, counted from 1
    micro_batch: int | None = None
    segments: tuple[int, int] | None = None  # of the sample: first and last that it may be at
    layer: int | None = None
    direction: str | None = None  # forward or backward

    def __str__(self) -> str:
        """Return it in words: `step 5, micro-batch 0, segments 0 to 3, backward of layer 1`."""
        words = [f"step {self.step}" if self.phase == "step" else f"{self.phase}, step {self.step}"]
        if self.micro_batch is not None:
            words.append(f"micro-batch {self.micro_batch}")
        if self.segments is not None:
            first, last = self.segments
            words.append(f"segment {first}" if first == last else f"segments {first} to {last}")
        if self.layer is not None:
            words.append(f"{self.direction} of layer {self.layer}")
        return ", ".join(words)


class Pulse:
    """A rank's place, a count of its changes, and how long recent steps took."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.beats = 0
        self.mark: Callable[[int, str], None] | None = None  # (level, what begins there)
        self.steps_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._clock, self._began = clock, clock()
        self._phase, self._step = "start", 0
        self._micro_batch: int | None = None
        self._segments: tuple[int, int] | None = None
        self.segment: int | None = None  # of those, where they go through the layers in turn
        self._layer: int | None = None
        self._direction: str | None = None

    def enter(self, phase: str, step: int) -> None:
        """Begin a phase (start, data, step, evaluate, save, finish) of a step, counted from 1."""
        now = self._clock()
        if self._phase == "step":
            self.steps_s.append(now - self._began)
        self._began, self._phase, self._step = now, phase, step
        self._micro_batch = self._segments = self._layer = self._direction = self.segment = None
        self.beats += 1
        if self.mark is not None:
            self.mark(0, f"{phase} {step}")

    def window(self, micro_batch: int, first: int, last: int) -> None:
        """Begin a BPTT window: segments first to last of a micro-batch."""
        self._micro_batch, self._segments = micro_batch, (first, last)
        self._layer = self._direction = self.segment = None
        self.beats += 1
        if self.mark is not None:
            self.mark(1, f"micro-batch {micro_batch}, segments {first} to {last}")

    def next_segment(self) -> None:
        """Begin the window's first segment, or the one after the last begun."""
        if self._segments is not None:
            self.segment = self._segments[0] if self.segment is None else self.segment + 1
        self.beats += 1

    def layer(self, layer: int, direction: str) -> None:
        """Begin a layer's forward or backward."""
        self._layer, self._direction = layer, direction
        self.beats += 1
        if self.mark is not None:
            self.mark(2, f"{direction} of layer {layer}")

    def place(self) -> Place:
        """Return where the rank is; another thread may read a mix of two neighbouring places."""
        return Place(
            self._phase,
            self._step,
            self._micro_batch,
            self._segments if self.segment is None else (self.segment, self.segment),
            self._layer,
            self._direction,
        )


def follow_layers(blocks: nn.ModuleList, pulse: Pulse) -> None:
    """Let each block tell the pulse when its forward and its backward begin."""
    for number, block in enumerate(blocks):
        _follow(block, number, pulse)


def follow_segments(memory: nn.Module, pulse: Pulse) -> None:
    """Let a memory that takes segments in turn tell the pulse when each begins."""
    if not isinstance(memory, InTurn):
        return
    open_one = memory.open

    def told(*args: Any) -> Any:
        pulse.next_segment()
        return open_one(*args)

    vars(memory)["open"] = told


def _follow(block: nn.Module, number: int, pulse: Pulse) -> None:
    def before(module: nn.Module, args: Any) -> None:
        pulse.layer(number, "forward")

    def after(module: nn.Module, args: Any, output: Any) -> None:
        # A tensor's hook, not a module's backward hook: that puts a node of its own in the graph.
        if not output[0].requires_grad:
            return
        segment = pulse.segment

        def backward(grad: torch.Tensor) -> None:
            pulse.segment = segment
            pulse.layer(number, "backward")

        output[0].register_hook(backward)

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)
