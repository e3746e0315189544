"""The compiled attention kernel against the slow twin in float64, and how it is built."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import cpu_flash
from model.compiled import use_compiled
from model.decoder import Decoder
from model.kernels import Blockwise, CpuCompiled, CpuFlash, choose_kernel
from model.local import FoldedSequence
from tests.compare import assert_each, relative
from tests.model.compiled_attention import needs_kernel, use_compiled_attention
from tests.model.memories import MEMORIES
from tests.model.small import Batch, batch_of, build, config_of, gradients

pytestmark = needs_kernel
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Sums of up to 1,100 in float32; bfloat16's inputs are exact, weights and results rounded once."""
NAMES = ("out", "lse", "dq", "dk", "dv")
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def inputs(
    rows: int, keys: int, heads: tuple[int, int], width: int, dtype: torch.dtype
) -> list[Tensor]:
    """Return q, k, v and dout."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads[0], rows), (heads[1], keys), (heads[1], keys), (heads[0], rows)]
    return [torch.randn(2, h, s, width, generator=generator).to(dtype) for h, s in shapes]


def both_ways(kernel: object, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> dict:
    """Run as a piece of a fold: backward's lse is larger than this piece's, its out another."""
    out, lse = kernel.forward(q, k, v, causal)
    final = ((out * 0.5).to(q.dtype), lse + 1)
    grads = kernel.backward(dout, q, k, v, *final, causal)
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def assert_twins(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> None:
    found = both_ways(cpu_flash, q, k, v, dout, causal)
    exact = both_ways(Blockwise(), *(x.double() for x in (q, k, v, dout)), causal)
    errors = {name: relative(found[name], exact[name]) for name in NAMES}
    assert max(errors.values()) < TOLERANCES[q.dtype], errors
    assert [x.dtype for x in found.values()] == [q.dtype, torch.float32, *[q.dtype] * 3]


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 65), (64, 64), (63, 129), (129, 63), (65, 511), (130, 1100), (513, 513)]
)
def test_it_is_the_slow_twin(size: tuple[int, int], causal: bool, dtype: torch.dtype) -> None:
    """Rows and keys around its blocks of 64 and 512, odd ones, more of either."""
    assert_twins(*inputs(*size, (4, 2), 16, dtype), causal)


@DTYPES
@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (6, 3)])
@pytest.mark.parametrize("width", [2, 6, 64, 128])
def test_heads_and_their_width(heads: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    assert_twins(*inputs(70, 70, heads, width, dtype), True)


@DTYPES
def test_inputs_are_read_as_they_lie(dtype: torch.dtype) -> None:
    """As a projection leaves them, sliced along the sequence, expanded, and with strided rows."""
    q, k, v, dout = inputs(80, 80, (4, 2), 16, dtype)
    expected = both_ways(cpu_flash, q, k, v[:1].expand(2, -1, -1, -1).contiguous(), dout, True)
    lie = [
        torch.stack((q, q), 2).transpose(1, 3).contiguous().transpose(1, 3)[:, :, 0],
        torch.cat((k, k), 2)[:, :, :80],
        v[:1].expand(2, -1, -1, -1),
        dout.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    assert [x.is_contiguous() for x in lie] == [False] * 4
    found = both_ways(cpu_flash, *lie, True)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@DTYPES
def test_rows_whose_lse_is_inf_did_not_read(dtype: torch.dtype) -> None:
    q, k, v, dout = inputs(100, 100, (4, 2), 16, dtype)
    kernel, rest = cpu_flash, slice(37, None)
    out, lse = kernel.forward(q, k, v, False)
    hidden = lse.clone()
    hidden[:, :, :37] = float("inf")
    dq, dk, dv = kernel.backward(dout, q, k, v, out, hidden, False)
    others = [x[:, :, rest] for x in (dout, q)]
    expected = kernel.backward(*others, k, v, out[:, :, rest], lse[:, :, rest], False)
    assert torch.count_nonzero(dq[:, :, :37]) == 0
    for own, other in ((dq[:, :, rest], expected[0]), (dk, expected[1]), (dv, expected[2])):
        assert relative(own, other) < TOLERANCES[dtype]


@DTYPES
def test_what_is_hidden_changes_no_bit(dtype: torch.dtype) -> None:
    q, k, v, dout = inputs(200, 200, (4, 2), 16, dtype)
    found = []
    for factor in (1, 300):
        k[:, :, 150:] *= factor
        v[:, :, 150:] *= factor
        out, lse = cpu_flash.forward(q, k, v, True)
        seen = [x[:, :, :150] for x in (out, lse)]
        found.append([*seen, cpu_flash.backward(dout, q, k, v, out, lse, True)[0][:, :, :150]])
    assert all(torch.equal(own, other) for own, other in zip(*found, strict=True))


@DTYPES
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(name: str, value: float, dtype: torch.dtype) -> None:
    tensors = dict(zip(("q", "k", "v", "dout"), inputs(70, 600, (4, 2), 16, dtype), strict=True))
    tensors[name][0, 0, 3, 5] = value
    found = both_ways(cpu_flash, *tensors.values(), False)
    aten = both_ways(CpuFlash(), *tensors.values(), False)
    for result in ("out", "dq"):
        assert not found[result][0].isfinite().all()
        assert torch.equal(found[result].isfinite(), aten[result].isfinite())
    assert found["out"][1].isfinite().all()  # the other sample


@DTYPES
def test_large_scores_are_no_further_off_than_atens(dtype: torch.dtype) -> None:
    """Of up to 50,000, where float32's own rounding shows in the weights."""
    q, k, v, dout = inputs(70, 600, (4, 2), 16, dtype)
    q, k = q * 64, k * 64
    found, aten = (both_ways(x, q, k, v, dout, False) for x in (cpu_flash, CpuFlash()))
    exact = both_ways(Blockwise(), *(x.double() for x in (q, k, v, dout)), False)
    for name in NAMES:
        assert relative(found[name], exact[name]) <= 2 * relative(aten[name], exact[name]), name


@DTYPES
def test_more_threads_change_no_bit(dtype: torch.dtype) -> None:
    arguments = (*inputs(200, 200, (4, 2), 16, dtype), True)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(both_ways(cpu_flash, *arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in NAMES)


@pytest.fixture
def switched_on() -> Iterator[None]:
    use_compiled(True)
    yield
    use_compiled(False)


class Spy:
    """Counts the calls of the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        for name in ("forward", "backward"):
            monkeypatch.setattr(cpu_flash, name, self.counting(getattr(cpu_flash, name)))

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.calls += 1
            return function(*args)

        return run


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize(
    ("rows", "width", "dtype", "taken"),
    [
        (128, 16, torch.float32, True),
        (127, 16, torch.float32, False),
        (32, 16, torch.bfloat16, not cpu_flash._capabilities().get("amx_bf16")),
        (31, 16, torch.bfloat16, False),
        (128, 15, torch.float32, False),
        (128, 16, torch.float64, False),
        (128, 16, torch.float16, False),
    ],
)
def test_it_is_taken_where_it_pays(
    rows: int, width: int, dtype: torch.dtype, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    q, k, v, dout = inputs(rows, 20, (3, 1), width, dtype)
    out, lse = choose_kernel(q).forward(q, k, v, False)
    choose_kernel(q).backward(dout, q, k, v, out, lse, False)
    assert spy.calls == 2 * taken


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("heads", [1, 3, 128])
def test_a_fold_takes_it_by_its_rows_whatever_its_heads(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    for rows, calls in ((128, 2), (64, 0)):
        q, k, v = (torch.randn(1, 1, rows, heads, 4, requires_grad=True) for _ in "qkv")
        sequence = FoldedSequence()
        sequence.fold(q, k, v).sum().backward()
        assert spy.calls == calls
        spy.calls = 0
        sequence.fold_slots(q[:, 0], k[:, 0], v[:, 0], pieces=[]).sum().backward()
        assert spy.calls == calls
        spy.calls = 0


@pytest.mark.usefixtures("switched_on")
def test_off_it_is_atens() -> None:
    q = torch.zeros(1, 1, 128, 16)
    assert isinstance(choose_kernel(q), CpuCompiled)
    use_compiled(False)
    assert type(choose_kernel(q)) is CpuFlash


@pytest.mark.parametrize(
    ("has", "taken"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, (True, True)),
        ({"avx512_f": True}, (True, False)),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, (True, False)),
        ({"avx2": True}, (False, False)),
        ({}, (False, False)),
    ],
)
def test_a_cpu_without_its_units_keeps_atens(
    has: dict[str, bool], taken: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_flash.library()  # built for what this CPU has
    monkeypatch.setattr(cpu_flash, "_capabilities", lambda: has)
    found = tuple(cpu_flash.takes.__wrapped__(x) for x in (torch.float32, torch.bfloat16))
    assert found == taken


def test_a_library_told_to_use_less_keeps_atens() -> None:
    """In a process of its own: oneDNN reads it once."""
    script = (
        "import torch; from model import cpu_flash;"
        " print(cpu_flash.takes(torch.float32), cpu_flash.takes(torch.bfloat16))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "False"]


def test_other_tensors_than_its_own_are_refused() -> None:
    q, k, v, dout = inputs(8, 8, (4, 2), 16, torch.float32)
    for bad in (
        (q, k.bfloat16(), v.bfloat16()),
        (q, k, v[:, :, :4]),
        (q, k, v[..., :8]),
        (q[..., :15], k[..., :15], v[..., :15]),
        (q[:1], k, v),
        (q[:, :3], k, v),
    ):
        with pytest.raises(AssertionError):
            cpu_flash.forward(*bad, False)
    with pytest.raises(AssertionError):
        cpu_flash.backward(dout, q, k, v, q, torch.zeros(2, 4, 8).double(), False)


def test_a_helper_makes_all_of_it_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests over memories and ranks that use it would test aten's."""
    use_compiled_attention(monkeypatch)
    spy = Spy(monkeypatch)
    q = torch.ones(1, 1, 1, 8)
    choose_kernel(q).forward(q, q, q, False)
    assert spy.calls == 1


@pytest.mark.parametrize("name", [n for n in MEMORIES if not n.startswith("landmark")])
def test_every_memory_learns_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(config_of(MEMORIES[name]), torch.float32)
    batch = batch_of(2, 3, 16)
    loss, expected = trained(model, batch)
    use_compiled_attention(monkeypatch)
    spy = Spy(monkeypatch)
    own_loss, found = trained(model, batch)
    assert spy.calls
    assert relative(own_loss, loss) < 1e-6
    assert_each(found, expected, 2e-5)


def trained(model: Decoder, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale)
    output.loss.backward()
    return output.loss.detach(), gradients(model)


def build_anew(monkeypatch: pytest.MonkeyPatch, folder: Path) -> object:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return cpu_flash.library.__wrapped__()


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", "echo no room left >&2\nexit 1\n"))
    with pytest.raises(ValueError, match=r"(?s)no room left.*leave train\.compile out"):
        build_anew(monkeypatch, tmp_path)
    monkeypatch.delenv("CXX")
    assert build_anew(monkeypatch, tmp_path)


def test_a_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"/proc/none/longhaul.*TORCH_EXTENSIONS_DIR"):
        build_anew(monkeypatch, Path("/proc/none"))


def test_a_killed_build_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first build writes half a library and hangs; its compiler outlives it."""
    compiler = tmp_path / "compiler"
    hang = 'for last; do :; done\necho half > "$last"\nexec sleep 60\n'
    environment = os.environ | {
        "CXX": script(compiler, hang), "TORCH_EXTENSIONS_DIR": str(tmp_path)
    }  # fmt: skip
    command = [sys.executable, "-c", "from model import cpu_flash; cpu_flash.library()"]
    with subprocess.Popen(command, env=environment, start_new_session=True) as first:
        try:
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob("longhaul/*/*.so")):
                assert time.monotonic() < deadline and first.poll() is None
                time.sleep(0.05)
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
            monkeypatch.setenv("CXX", script(compiler, 'exec g++ "$@"\n'))  # by the same name
            assert build_anew(monkeypatch, tmp_path)
        finally:
            os.killpg(first.pid, signal.SIGKILL)
    assert len(list(tmp_path.glob("longhaul/*.so"))) == 1
