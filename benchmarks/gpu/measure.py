"""What the parts share: the device, times, errors, and what a part is asked for."""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16
UNCOUNTED = 2
"""Rounds before those that count: the first compiles, the second finds its memory in the cache."""


class Options(NamedTuple):
    """What a part is asked for."""

    tiny: bool
    rounds: int


class Error(NamedTuple):
    """A relative difference, and what it may be."""

    value: float
    limit: float

    @property
    def wrong(self) -> bool:
        """Whether it is too large; what is no number is."""
        return not self.value <= self.limit

    def __str__(self) -> str:
        return f"**{self.value:.1e}** > {self.limit:.0e}" if self.wrong else f"{self.value:.1e}"


class Times(NamedTuple):
    """Seconds of the rounds that count."""

    median: float
    spread: float  # longest less shortest, in medians

    @property
    def ms(self) -> str:
        """The median in milliseconds, and the spread."""
        return f"{1e3 * self.median:.2f} ({self.spread:.0%})"


class Failed(str):
    """What a row says in the place of numbers that could not be taken."""


Run = Callable[[], object]
Row = list[str | Error]
Table = Iterator[Row]
"""The header, then the rows."""


def attempt(kind: list[str], make: Callable[[], Row]) -> Row:
    """Return the row that make returns behind `kind`; where it raises, one that says so.

    Raises what is no matter of this row: a module that is missing, a device that answers no more.
    """
    try:
        return [*kind, *make()]
    except ModuleNotFoundError:
        raise
    except Exception as error:
        print(f"{', '.join(kind)}:", file=sys.stderr)
        traceback.print_exc()
        if DEVICE.type == "cuda":  # a failed capture leaves its stream behind
            torch.cuda.set_stream(torch.cuda.default_stream())
        wait()
        forget()
        first = (str(error).splitlines() or [""])[0]
        return [*kind, Failed(f"failed: {type(error).__name__}: {first[:120]}")]


def times(run: Run, rounds: int) -> Times:
    """Return the seconds of a run on the device."""
    found = []
    for _ in range(UNCOUNTED + rounds):
        wait()
        began = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - began)
    counted = found[UNCOUNTED:]
    median = statistics.median(counted)
    return Times(median, (max(counted) - min(counted)) / median)


def as_graph(run: Run) -> Run:
    """Return what replays a run as one CUDA graph; on a CPU, which has none, the run itself.

    What it reads and leaves lies still: a replay writes to the tensors of the captured run.
    """
    if DEVICE.type == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries make their workspaces in their first calls on a stream
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph.replay


def wait() -> None:
    """Return when the device has nothing left to do."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def forget() -> None:
    """Give back what no tensor needs; the peak begins anew."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Return the most that tensors held since `forget`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0


def reserved_gib() -> float:
    """Return the most that torch took from the device for them, holes and all; 0 on a CPU."""
    return torch.cuda.max_memory_reserved() / 2**30 if DEVICE.type == "cuda" else 0.0


def difference(own: Tensor, other: Tensor) -> float:
    """Return the relative difference of two tensors, in float64 on the host."""
    a, b = own.detach().cpu().double(), other.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def named(dtype: torch.dtype) -> str:
    """Return a type's name."""
    return str(dtype).removeprefix("torch.")


def describe() -> str:
    """Return what the numbers below are of."""
    torch_is = f"torch {torch.__version__}"
    if DEVICE.type == "cpu":
        return f"A CPU, {torch_is}: no time means anything."
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    name = torch.cuda.get_device_name()
    return f"{name}, {torch_is}, CUDA {torch.version.cuda}, {free:.1f} of {total:.1f} GiB free."
