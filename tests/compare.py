"""How far apart two results are, relative to the larger one's size."""

from collections.abc import Mapping

import torch
from torch import Tensor


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return max |actual - expected| / max |expected|, the former alone where the latter is 0.

    NaN anywhere gives NaN, which passes no comparison.
    """
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return 0.0
    wide = torch.promote_types(actual.dtype, expected.dtype)
    if not wide.is_floating_point:
        wide = torch.float64
    apart = (actual.to(wide) - expected.to(wide)).abs().max()
    size = expected.to(wide).abs().max()
    return float(apart / size if size > 0 else apart)


def assert_each(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> None:
    """Assert that both hold the same names, each within tolerance; name all that are not."""
    assert actual.keys() == expected.keys()
    far = {name: relative(actual[name], expected[name]) for name in expected}
    far = {name: error for name, error in far.items() if not error <= tolerance}
    assert not far, far
