"""What an engine shows of its state, to be saved and restored."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Fragment(NamedTuple):
    """This rank's share of one parameter's training state.

    values are views: copying into them changes the state. Each holds elements
    [start, start + numel) of the flattened tensor-parallel part of the parameter. A frozen
    parameter has a master alone: the weight itself, in the type that the model computes with.
    """

    name: str
    start: int
    values: dict[str, Tensor]  # master, exp_avg, exp_avg_sq: [numel] float32

    @property
    def numel(self) -> int:
        """Elements of the share."""
        return next(iter(self.values.values())).numel()
