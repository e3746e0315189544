"""What is fed back of rows that a segment leaves: as they are, normalised, or latched."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from model.layers import normalise, scattered


class Carry(nn.Module):
    """`paper`: the rows as they are. Their norm may grow with every segment until nothing new can
    be written. `norm`: RMSNorm with a learned gain. `latch`: gain * tanh(beta * rms-normalised),
    bounded and with fixed points, so a value can be held over very many segments.
    """  # noqa: D205

    def __init__(
        self, features: int, eps: float, state: Literal["paper", "norm", "latch"], beta: float
    ) -> None:
        super().__init__()
        self.eps, self.state, self.beta = eps, state, beta
        if state != "paper":
            self.gain = scattered(nn.Parameter(torch.ones(features)))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [rows, D], scattered as rows of tokens are -> the same shape and type."""
        match self.state:
            case "paper":
                return rows
            case "norm":
                return normalise(rows, self.eps) * self.gain.to(rows.dtype)
            case "latch":
                bounded = torch.tanh(self.beta * normalise(rows, self.eps))
                return bounded * self.gain.to(rows.dtype)
