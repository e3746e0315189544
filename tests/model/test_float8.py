"""Products in FP8 against a twin that rounds number by number, and what they must not lose."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from model import float8
from model.compiled import use_compiled
from model.config import ComputeConfig, FamMemory
from model.deferred import Linear
from model.float8 import Float8Linear, check_float8, float8_product, rounded
from tests.compare import relative
from tests.model.small import batch_of, build, config_of, gradients


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16()


def four_bits(value: float, largest: float) -> float:
    """Round to four significant bits, ties to even; fewer where the row's largest dwarfs it."""
    if value == 0:
        return 0.0
    scale = 2.0 ** math.floor(math.log2(448 / largest))
    exponent = max(math.floor(math.log2(abs(value) * scale)), -6)
    step = 2.0 ** (exponent - 3)
    return round(value * scale / step) * step / scale


def slowly(x: Tensor) -> Tensor:
    rows = x.double().tolist()
    return torch.tensor(
        [[four_bits(v, max(map(abs, row))) for v in row] for row in rows], dtype=torch.float64
    )


def widely(x: Tensor) -> Tensor:
    values, scale = rounded(x)
    return (values.double() * scale)[:, : x.shape[1]]


def products(x: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = float8_product(x, weight)
    out.backward(upstream)
    assert x.grad is not None and weight.grad is not None
    return out.detach(), x.grad, weight.grad


def test_numbers_are_rounded_to_four_bits_by_their_rows_largest() -> None:
    x = random(9, 32) * torch.logspace(-20, 20, 9, base=2).unsqueeze(1).bfloat16()
    x[3, 5] = x[3, 0] * 2.0**20  # what is so far below it is lost
    assert torch.equal(widely(x), slowly(x))
    assert widely(x)[3, 1] == 0


def test_the_three_products_are_of_rounded_factors() -> None:
    x, weight, upstream = random(21, 32), random(48, 32, seed=1), random(21, 48, seed=2)
    out, of_x, of_weight = products(x, weight, upstream)
    bfloat16 = 2.0**-8
    assert relative(out.double(), slowly(x) @ slowly(weight).T) < bfloat16
    assert relative(of_x.double(), slowly(upstream) @ slowly(weight.T).T) < bfloat16
    assert relative(of_weight.double(), slowly(upstream.T) @ slowly(x.T).T) < bfloat16


def test_what_has_four_bits_is_multiplied_exactly() -> None:
    """Small integers, whose sums bfloat16 holds too."""
    generator = torch.Generator().manual_seed(0)
    x, weight, upstream = (
        torch.randint(-3, 4, shape, generator=generator).bfloat16()
        for shape in ((5, 16), (32, 16), (5, 32))
    )
    out, of_x, of_weight = products(x, weight, upstream)
    assert torch.equal(out, x @ weight.T)
    assert torch.equal(of_x, upstream @ weight)
    assert torch.equal(of_weight, upstream.T @ x)


def test_a_row_knows_nothing_of_the_others() -> None:
    x, weight = random(8, 32), random(16, 32, seed=1)
    whole = float8_product(x, weight)
    assert torch.equal(float8_product(x[2:5], weight), whole[2:5])
    x[7] *= 2.0**40  # in one scale for all, the others would be zeros
    assert torch.equal(float8_product(x, weight)[:7], whole[:7])


def test_a_power_of_two_passes_through() -> None:
    x, weight = random(8, 32), random(16, 32, seed=1)
    assert torch.equal(float8_product(x * 2.0**-9, weight), float8_product(x, weight) * 2.0**-9)


def test_zeros_stay_zeros_and_what_is_not_finite_is_told() -> None:
    x, weight = random(4, 16), random(16, 16, seed=1)
    x[0], x[1, 3], x[2, 3] = 0.0, float("inf"), float("nan")
    out = float8_product(x, weight)
    assert (out[0] == 0).all()
    assert out[1:3].isnan().all()
    assert out[3].isfinite().all()


def test_only_asked_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen weight under adapters has none."""
    calls: list[torch.Size] = []
    true = torch.nn.functional.scaled_mm

    def counting(a: Tensor, *rest: object, **how: object) -> Tensor:
        calls.append(a.shape)
        return true(a, *rest, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", counting)
    x, frozen = random(4, 16).requires_grad_(), random(32, 16, seed=1)
    float8_product(x, frozen).sum().backward()
    assert len(calls) == 2
    assert x.grad is not None


def test_only_what_gradients_need_is_kept() -> None:
    def kept(x: Tensor, weight: Tensor) -> list[torch.Size]:
        found: list[torch.Size] = []

        def pack(saved: Tensor) -> Tensor:
            found.append(saved.shape)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            float8_product(x, weight)
        return found

    x, weight = random(4, 16), random(32, 16, seed=1)
    assert kept(x.requires_grad_(), weight) == [weight.shape]
    assert kept(x.detach(), weight.requires_grad_()) == [x.shape]


def test_no_rows_are_no_gradient() -> None:
    _, _, of_weight = products(random(0, 16), random(32, 16, seed=1), random(0, 32))
    assert torch.equal(of_weight, torch.zeros(32, 16).bfloat16())


def test_other_types_are_refused() -> None:
    """Float32 would come out with four bits: it is asked for where numbers are to be exact."""
    with pytest.raises(TypeError, match=r"of bfloat16, not of torch\.float32"):
        float8_product(random(4, 16).float(), random(16, 16).float())


def test_one_kernel_rounds_weights_of_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler gives up behind eight, with a warning, and a run would be slow for good."""
    counter = CompileCounterWithBackend("aot_eager")
    plain = rounded.__wrapped__  # type: ignore[attr-defined]
    kernel = torch.compile(plain, dynamic=True, backend=counter)
    monkeypatch.setattr(float8, "rounded", kernel)
    for size in range(16, 160, 16):
        weight = nn.Parameter(random(2 * size, size))
        float8_product(random(21, size).requires_grad_(), weight).sum().backward()
    assert 0 < counter.frame_count <= 6  # padded or not, of a view or not


@pytest.fixture
def _compiled() -> Iterator[None]:
    use_compiled(True)
    yield
    use_compiled(False)


@pytest.mark.usefixtures("_compiled")
def test_compiled_rounding_is_the_same() -> None:
    x = random(9, 40)
    assert torch.equal(widely(x), slowly(x))


def test_the_maps_of_every_block_are_in_fp8_and_no_others() -> None:
    config = config_of(FamMemory(slots=4), hidden_size=32, ffn_size=48)
    model = build(config, compute=ComputeConfig(fp8=True))
    found = {name for name, each in model.named_modules() if isinstance(each, Float8Linear)}
    maps = ("qkv.linear", "output", "ffn.gate_up", "ffn.down")
    assert found == {f"blocks.{i}.{name}" for i in range(2) for name in maps}
    plain = {name for name, each in model.named_modules() if type(each) is Linear}
    assert plain == {"head.output"}


@pytest.mark.parametrize("how", ["selective", "block"])
def test_recomputation_changes_nothing(how: str) -> None:
    config = config_of(FamMemory(slots=4), hidden_size=32, ffn_size=48)
    batch = batch_of(2, 3, 16)
    found = []
    for compute in (ComputeConfig(fp8=True), ComputeConfig(how, fp8=True)):  # type: ignore[arg-type]
        model = build(config, torch.bfloat16, compute)
        model(batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale).loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(ValueError, match=r"8\.9 or later, and NVIDIA A100-SXM4-80GB has 8\.0"):
        check_float8(torch.device("cuda"))
    check_float8(torch.device("cpu"))


def test_a_torch_without_the_product_on_a_cpu_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = random(37, 64), random(48, 64, seed=1)
    expected = float8.rounded_product(a, b)
    monkeypatch.setattr(float8, "_multiplies_on_cpu", lambda: False)
    found = float8.rounded_product(a, b)
    assert found.dtype == torch.bfloat16
    assert relative(found, expected) < 1e-3
