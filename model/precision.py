"""The type that sums are taken in."""

import torch
from torch import Tensor


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which sums over x, softmax and norms are computed: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)
