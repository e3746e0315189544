"""Assertions on how far apart two results are, by the product's own measure."""

from collections.abc import Mapping

from torch import Tensor

from train.checking.compare import relative

__all__ = ["assert_each", "relative"]


def assert_each(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> None:
    """Assert that both hold the same names, each within tolerance; name all that are not."""
    assert actual.keys() == expected.keys()
    far = {name: relative(actual[name], expected[name]) for name in expected}
    far = {name: error for name, error in far.items() if not error <= tolerance}
    assert not far, far
