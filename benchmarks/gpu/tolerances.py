"""How far a result may be from its twin: relative, in the norm of the whole tensor.

A piece that is lost, masked wrongly or added twice is off by 1e-1 and more.
"""

from __future__ import annotations

import torch

KERNELS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Against float64: float32 sums of up to 2048 terms; bfloat16 rounds at 2e-3 to 4e-3 the weights,
what they are multiplied by and the result. (Flash kernels sum in float32.)"""

LSE = 1e-5
"""Of inputs that the twin has as well: float32 whatever they are."""

RING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Against one call of the same kernel: both have its error."""

LOSS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
"""Of a model, against float64 on the host: a mean over tokens, so rounding errors cancel."""

WEIGHTS = 1e-3
"""Of the worst weight's gradient in float32. Segments after one another raise rounding errors, and
what is searched (landmark, hmt) can differ where two scores are near."""

GRADIENTS = 5e-2
"""Of all gradients in bfloat16; on a CPU it is 5e-3 to 8e-3."""

FP8 = 6e-2
"""FP8 products of normal numbers against bfloat16's: two factors, each off by 2.6e-2 (2^-4 of a
number at most, evenly spread)."""

FP8_TWIN = 1e-2
"""The same factors on host and device; sums and results are rounded. Hopper's tensor cores sum FP8
products with fewer bits than float32 has."""

GRAPHS = 1e-2
"""Logits in bfloat16 of the same operations; kernels may choose other sizes of tiles."""
