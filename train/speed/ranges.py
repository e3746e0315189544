"""Ranges for Nsight Systems: where a step is, and the parts that a layer's time goes to.

Parts are wrapped from outside, in a run that asks for it: the model knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from model.attention import Exchange
from model.decoder import Decoder
from model.local import FoldedSequence
from model.memory.in_turn import InTurn
from parallel.engine import Engine


class NvtxRanges:
    """Ranges of the process: a phase, in it a BPTT window or the optimizer, in it a layer.

    Not a thread's ranges: the backward of layers runs in a thread of autograd's.
    """

    def __init__(self) -> None:
        self._open: list[int | None] = [None, None, None]

    def begin(self, level: int, name: str) -> None:
        """End what is open at this level and inside it, and begin a range there."""
        for inner in range(len(self._open) - 1, level - 1, -1):
            handle, self._open[inner] = self._open[inner], None
            if handle is not None:
                torch.cuda.nvtx.range_end(handle)
        self._open[level] = torch.cuda.nvtx.range_start(name)


def name_parts(model: Decoder, engine: Engine, ranges: NvtxRanges) -> None:
    """Let the memory, attention and its visits, the loss and the optimizer be ranges.

    Those of the model are ranges of the thread that runs them: they end where they began.
    """
    for block in model.layers():
        for name, part in block.mixer.parts.items():
            _wrap(part, "chain", f"chain of {name}")
    if isinstance(model.memory, InTurn):
        _wrap(model.memory, "open", "open the segment")
        _wrap(model.memory, "close", "close the segment")
    if isinstance(model.sequence, FoldedSequence):
        _wrap(model.sequence, "fold", "fold")
        _wrap(model.sequence, "fold_slots", "fold of rows")
        _name_visits(model.sequence.exchange)
    _wrap(model.head, "forward", "head and loss")
    step = engine.step

    def optimizer(lr: float) -> float | None:
        ranges.begin(1, "optimizer")
        return step(lr)

    vars(engine)["step"] = optimizer


def _name_visits(exchange: Exchange) -> None:
    """Name the work on each rank's keys; what a visit takes beyond it is waiting for the next."""
    for method, of in (("visit", "keys"), ("visit_back", "gradients of keys")):
        inner = getattr(exchange, method)

        def visit(k: Any, v: Any, step: Any, inner: Any = inner, of: str = of) -> Any:
            def named(source: int, *keys: Any) -> Any:
                with torch.cuda.nvtx.range(f"{of} of rank {source}"):
                    return step(source, *keys)

            return inner(k, v, named)

        vars(exchange)[method] = visit
        _wrap(exchange, method, method.replace("_", " "))
    _wrap(exchange, "combine", "merge over ranks")


def _wrap(owner: object, method: str, name: str) -> None:
    """Let each call of an object's method be a range."""
    inner: Callable[..., Any] = getattr(owner, method)

    def named(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.nvtx.range(name):
            return inner(*args, **kwargs)

    vars(owner)[method] = named
