"""Weight gradients made at once for all uses of a weight."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.config import FamMemory
from model.deferred import Linear, deferred, defers
from model.float8 import Float8Linear
from tests.model.small import batch_of, build, config_of


class Written(TorchDispatchMode):
    """Counts results of matrix products by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.linear.default):
            self.shapes[tuple(result.shape)] += 1
        return result


def chain(a: nn.Linear, b: nn.Linear, x: Tensor, count: int) -> Tensor:
    """A recurrence over two maps, each used `count` times."""
    total = x.sum() * 0
    for n in range(count):
        x = x + torch.tanh(b(torch.tanh(a(x)))) * (n + 1)
        total = total + x.square().mean()
    return total


def gradients(a, b, x, run) -> list[Tensor]:
    leaves = [x, *a.parameters(), *b.parameters()]
    return list(torch.autograd.grad(run(), [leaf for leaf in leaves if leaf.requires_grad]))


@pytest.fixture
def maps():
    torch.manual_seed(0)
    a, b = Linear(6, 10).double(), Linear(10, 6, bias=False).double()
    return a, b, torch.randn(3, 6, dtype=torch.float64, requires_grad=True)


def under_deferred(run):
    def inside():
        with deferred():
            return run()

    return inside


def test_gradients_are_those_of_autograd(maps):
    a, b, x = maps
    expected = gradients(a, b, x, lambda: chain(a, b, x, 5))
    found = gradients(a, b, x, under_deferred(lambda: chain(a, b, x, 5)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_a_weights_gradient_is_one_product(maps):
    a, b, x = maps
    counts = {}
    for count in (2, 7):
        with Written() as written:
            gradients(a, b, x, under_deferred(lambda count=count: chain(a, b, x, count)))
        counts[count] = written.shapes[10, 6], written.shapes[6, 10]
    assert counts == {2: (1, 1), 7: (1, 1)}
    with Written() as written:
        gradients(a, b, x, lambda: chain(a, b, x, 7))
    assert written.shapes[10, 6] == 7, "else the test above shows nothing"


def test_backward_through_a_retained_graph_counts_each_use_once_again(maps):
    a, b, x = maps
    with deferred():
        loss = chain(a, b, x, 3)
    leaves = [x, *a.parameters(), *b.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_uses_that_the_loss_does_not_read_add_nothing(maps):
    a, b, x = maps

    def run() -> Tensor:
        loss = chain(a, b, x, 2)
        chain(a, b, x + 1, 4)
        return loss

    expected = gradients(a, b, x, lambda: chain(a, b, x, 2))
    for one, other in zip(gradients(a, b, x, under_deferred(run)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_uses_outside_and_inside_add_up(maps):
    a, b, x = maps

    def run() -> Tensor:
        outside = chain(a, b, x, 1)
        with deferred():
            inside = chain(a, b, x * 2, 3)
        return outside + inside + chain(a, b, x - 1, 1)

    def plain() -> Tensor:
        return chain(a, b, x, 1) + chain(a, b, x * 2, 3) + chain(a, b, x - 1, 1)

    for one, other in zip(gradients(a, b, x, run), gradients(a, b, x, plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_inside_a_checkpoint(maps):
    a, b, x = maps
    run = under_deferred(lambda: chain(a, b, x, 4))
    expected = gradients(a, b, x, run)
    found = gradients(a, b, x, lambda: checkpoint(run, use_reentrant=False))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_frozen_weight_gets_no_gradient_and_its_rows_do(maps):
    a, b, x = maps
    a.weight.requires_grad_(False)
    expected = gradients(a, b, x, lambda: chain(a, b, x, 3))
    found = gradients(a, b, x, under_deferred(lambda: chain(a, b, x, 3)))
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_nothing_is_deferred_outside_nor_without_gradients(maps):
    a, _, _ = maps
    assert not defers(a.weight)
    with pytest.raises(RuntimeError, match="mine"), deferred():
        assert defers(a.weight)
        with torch.no_grad():
            assert not defers(a.weight)
        raise RuntimeError("mine")
    assert not defers(a.weight)


def test_a_weight_written_to_before_the_backward_is_noticed(maps):
    a, b, x = maps
    with deferred():
        loss = chain(a, b, x, 2)
    with torch.no_grad():
        a.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fp8_products_round_the_rows_of_all_uses_together():
    torch.manual_seed(0)
    linear = Float8Linear(32, 48, bias=False).bfloat16()
    x = torch.randn(4, 8, 32).bfloat16()
    upstream = torch.randn(4, 8, 48).bfloat16()
    linear(x.flatten(0, 1)).backward(upstream.flatten(0, 1))
    expected, linear.weight.grad = linear.weight.grad, None
    with deferred():
        outs = [linear(part) for part in x]
    torch.autograd.backward(outs[::-1], list(upstream)[::-1])
    assert torch.equal(linear.weight.grad, expected)


def test_fams_chain_makes_each_weights_gradient_at_once():
    products = {}
    for count in (2, 5):
        model, batch = build(config_of(FamMemory(slots=3))), batch_of(1, count, 7)
        loss = model(batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale).loss
        with Written() as written:
            loss.backward()
        block = model.blocks[0]
        products[count] = [
            written.shapes[tuple(linear.weight.shape)]
            for linear in (block.qkv.linear, block.output, block.ffn.gate_up, block.ffn.down)
        ]
    assert products[2] == products[5]
    assert min(products[2]) > 0
