"""What `recomputed` keeps, and that its gradients are the plain ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.recompute import recomputed


def gradients(run: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_()
    return list(torch.autograd.grad(run(x * 2, weight).square().sum(), (x, weight)))


def test_gradients_are_the_plain_ones() -> None:
    own = gradients(lambda x, w: recomputed(functional.silu, x, lambda y: y @ w))
    for actual, expected in zip(own, gradients(lambda x, w: functional.silu(x) @ w), strict=True):
        assert torch.equal(actual, expected)


def test_one_inside_another() -> None:
    def nested(x: Tensor, w: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            result: Tensor = recomputed(torch.tanh, y + 1, lambda z: z @ w + y @ w)
            return result

        result: Tensor = recomputed(functional.silu, x, inner)
        return result

    def plain(x: Tensor, w: Tensor) -> Tensor:
        y = functional.silu(x)
        return torch.tanh(y + 1) @ w + y @ w

    for actual, expected in zip(gradients(nested), gradients(plain), strict=True):
        assert torch.equal(actual, expected)


def test_the_result_is_not_kept() -> None:
    """With a gradient of the weight alone, what computes again is what was not kept for it."""
    x, weight, made = torch.randn(4, 6), torch.randn(6, 3).requires_grad_(), []

    def compute(x: Tensor) -> Tensor:
        made.append(1)
        return functional.silu(x)

    out = recomputed(compute, x, lambda y: y @ weight)
    assert len(made) == 1
    out.sum().backward()
    assert len(made) == 2


def test_what_was_written_to_since_is_an_error() -> None:
    x, weight = torch.randn(4, 6).requires_grad_() * 1, torch.randn(6, 3).requires_grad_()
    out = recomputed(torch.neg, x, lambda y: y @ weight)
    x.detach().zero_()
    with pytest.raises(RuntimeError, match="written to since forward"):
        out.sum().backward()


def test_without_gradients_nothing_is_different() -> None:
    with torch.no_grad():
        assert torch.equal(recomputed(torch.neg, torch.ones(2), torch.neg), torch.ones(2))
