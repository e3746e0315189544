"""What rank 0 shows while a run goes on: a bar on a terminal, plain lines in a batch job's log.

step 1200/50000 | loss 2.713 | gnorm 0.81 | lr 2.9e-4 | 1.21M tok/s (37.8k/rank) | MFU 41%
| mem 61.2 GiB | eta 1d03h
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, TextIO

from tqdm import tqdm


class Status(NamedTuple):
    """What is known after a step; None: not known, and not shown."""

    loss: float
    grad_norm: float | None  # None: not finite, the step was skipped
    lr: float
    tokens_per_s: float | None = None  # of all ranks
    mfu: float | None = None  # 1.0 is the peak
    memory_bytes: int | None = None  # the most one device held


class Progress:
    """The steps of a run, shown on rank 0 and silent elsewhere."""

    def __init__(
        self,
        steps: int,
        *,
        first: int = 0,
        log_every: int = 10,
        ranks: int = 1,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start at step `first` of `steps`: a resumed run's count goes on."""
        self.steps, self.first, self.log_every, self.ranks = steps, first, log_every, ranks
        self._shown, self._stream, self._clock = shown, stream or sys.stderr, clock
        self._begin: tuple[int, float] | None = None
        self._lines = shown and not self._stream.isatty()
        self._bar = tqdm(
            total=steps,
            initial=first,
            unit="step",
            file=self._stream,
            dynamic_ncols=True,
            disable=not shown or self._lines,
        )

    def update(self, step: int, status: Status) -> None:
        """Show that `step` steps are done; call it after each.

        In a log a line comes every log_every steps, after the first step and after the last.
        """
        # From the end of the first step on: it compiles, connects and allocates.
        begin, begin_s = self._begin = self._begin or (step, self._clock())
        if not self._lines:
            self._bar.set_postfix_str(status_text(status, self.ranks), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        if step % self.log_every and step not in (self.first + 1, self.steps):
            return
        texts = [f"step {step}/{self.steps}", status_text(status, self.ranks)]
        if begin < step < self.steps:
            rate_s = (self._clock() - begin_s) / (step - begin)
            texts.append(f"eta {duration(rate_s * (self.steps - step))}")
        self.say(" | ".join(texts))

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self._shown:
            tqdm.write(text, file=self._stream)
            self._stream.flush()

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def status_text(status: Status, ranks: int) -> str:
    """Return what a line says of a step, without its number and the time left."""
    norm = "not finite: skipped" if status.grad_norm is None else f"{status.grad_norm:.2f}"
    parts = [f"loss {status.loss:.3f}", f"gnorm {norm}", f"lr {rate(status.lr)}"]
    if status.tokens_per_s is not None:
        speed = f"{short(status.tokens_per_s)} tok/s"
        if ranks > 1:
            speed += f" ({short(status.tokens_per_s / ranks)}/rank)"
        parts.append(speed)
    if status.mfu is not None:
        parts.append(f"MFU {percent(status.mfu)}")
    if status.memory_bytes is not None:
        parts.append(f"mem {gibibytes(status.memory_bytes)}")
    return " | ".join(parts)


def short(count: float) -> str:
    """Return a count in three digits: 987, 38.0k, 1.21M, 15.0T."""
    if not math.isfinite(count):
        return str(count)
    for unit in ("", "k", "M", "G"):
        # the rounded number decides: 999.6 is 1.00k, not 1000
        if abs(float(f"{count:.3g}")) < 1000:
            return f"{count:.0f}" if unit == "" else _three_digits(count) + unit
        count /= 1000
    return _three_digits(count) + "T"


def _three_digits(x: float) -> str:
    size = abs(float(f"{x:.3g}"))
    return f"{x:.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def rate(lr: float) -> str:
    """Return a learning rate: 2.9e-4."""
    mantissa, exponent = f"{lr:.1e}".split("e")
    return "0" if lr == 0 else f"{mantissa}e{int(exponent)}"


def percent(share: float) -> str:
    """Return a share of 1: 41%, and below ten percent one digit more: 3.2%."""
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"


def gibibytes(count: int) -> str:
    """Return bytes: 61.2 GiB, below one GiB 310 MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Return two units of time: 45s, 3m20s, 2h05m, 1d03h."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    minutes = round(whole / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    hours = round(whole / 3600)
    return f"{hours // 24}d{hours % 24:02}h"
