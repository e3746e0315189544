"""What trains a model: the interface, and the one place that chooses who does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.fragment import Fragment
from parallel.mesh import Mesh


class Engine(Protocol):
    """A model with its optimizer."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model forward."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of loss, this rank's part of the global mean. last: before `step`."""
        ...

    def step(self, lr: float) -> float | None:
        """Update the weights; return the gradient norm before clipping, over all ranks.

        lr is multiplied by a parameter group's own `lr_scale`, where it has one. Returns None, and
        leaves weights and moments as they were, where a gradient is not finite.
        """
        ...

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's share of master weights and moments, as views, by parameter."""
        ...

    def optimizer_step_count(self) -> float:
        """Return how many updates the moments have seen."""
        ...

    def restore(self, step_count: float) -> None:
        """Call after copying into `fragments`: weights follow the masters, moments their count."""
        ...


def make_engine(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    mesh: Mesh,
    *,
    stage: int,
    bf16: bool,
    clip: float,
    cut_above: int | None = None,
) -> Engine:
    """Return DeepSpeed's ZeRO; where there is nobody to share with, an engine that shares nothing.

    stage: of ZeRO, 1 to 3; clip: the largest norm of the whole gradient; cut_above: see ZeroEngine.
    """
    if mesh.zero_size == 1:
        from parallel.whole import WholeEngine

        return WholeEngine(model, optimizer, mesh, bf16=bf16, clip=clip)
    from parallel.zero import ZeroEngine

    return ZeroEngine(
        model, optimizer, mesh, stage=stage, bf16=bf16, clip=clip, cut_above=cut_above
    )
