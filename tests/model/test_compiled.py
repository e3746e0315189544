"""Fused kernels against the plain functions they come from."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model import compiled
from model.compiled import fused, use_compiled
from model.config import ComputeConfig, FamMemory
from tests.compare import assert_each, relative
from tests.model.small import Batch, batch_of, build, config_of, gradients

needs_compiler = pytest.mark.slow  # a minute of g++ for the first of them


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    use_compiled(False)


def test_off_it_is_the_function_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", None)  # would raise
    assert fused(lambda x: x + 1)(2) == 3


def test_a_machine_without_a_compiler_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"train\.compile needs a C\+\+ compiler.*no-such"):
        use_compiled(True)
    assert not compiled._on


@needs_compiler
@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
def test_a_model_with_fused_kernels_learns_the_same(checkpointing: str) -> None:
    compute = ComputeConfig(checkpointing=checkpointing, loss_chunk=24)  # type: ignore[arg-type]
    model = build(config_of(FamMemory(slots=4, window=1)), torch.float32, compute)
    found = []
    for on in (False, True):
        use_compiled(on)
        found.append([trained(model, batch_of(2, count, 16)) for count in (3, 2, 5)])
    for (loss, grads), (expected, expected_grads) in zip(*found, strict=True):
        assert relative(loss, expected) < 1e-6
        assert_each(grads, expected_grads, 1e-5)


def trained(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale)
    output.loss.backward()
    return output.loss.detach(), gradients(model)  # type: ignore[arg-type]


@needs_compiler
def test_no_kind_of_call_is_one_too_many(caplog: pytest.LogCaptureFixture) -> None:
    use_compiled(True)
    double = fused(lambda x: x * 2)
    for dimensions in range(1, 6):
        for grad in (False, True):
            assert (
                double(torch.ones([3] * dimensions, requires_grad=grad)).sum() == 2 * 3**dimensions
            )
    assert "recompile_limit" not in caplog.text


@needs_compiler
def test_no_result_depends_on_which_shape_came_first() -> None:
    model = build(config_of(FamMemory(slots=4, window=1)), torch.float32)
    use_compiled(True)
    first = trained(model, batch_of(2, 3, 16))
    trained(model, batch_of(1, 5, 8))
    torch.compiler.reset()
    trained(model, batch_of(1, 5, 8))
    again = trained(model, batch_of(2, 3, 16))
    assert torch.equal(first[0], again[0])
    assert_each(first[1], again[1], 0.0)
