"""The compiled attention kernel against the slow twin in float64, and how it is built."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import cpu_flash
from model.compiled import use_compiled
from model.cpu_flash import CompiledFlash
from model.kernels import Blockwise, CpuFlash, choose_kernel
from tests.compare import relative
from tests.model.compiled_attention import needs_kernel, use_compiled_attention

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
    found = both_ways(CompiledFlash(), q, k, v, dout, causal)
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
    expected = both_ways(
        CompiledFlash(), q, k, v[:1].expand(2, -1, -1, -1).contiguous(), dout, True
    )
    lie = [
        torch.stack((q, q), 2).transpose(1, 3).contiguous().transpose(1, 3)[:, :, 0],
        torch.cat((k, k), 2)[:, :, :80],
        v[:1].expand(2, -1, -1, -1),
        dout.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    assert [x.is_contiguous() for x in lie] == [False] * 4
    found = both_ways(CompiledFlash(), *lie, True)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@DTYPES
def test_rows_whose_lse_is_inf_did_not_read(dtype: torch.dtype) -> None:
    q, k, v, dout = inputs(100, 100, (4, 2), 16, dtype)
    kernel, rest = CompiledFlash(), slice(37, None)
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
        out, lse = CompiledFlash().forward(q, k, v, True)
        seen = [x[:, :, :150] for x in (out, lse)]
        found.append(
            [*seen, CompiledFlash().backward(dout, q, k, v, out, lse, True)[0][:, :, :150]]
        )
    assert all(torch.equal(own, other) for own, other in zip(*found, strict=True))


@DTYPES
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(name: str, value: float, dtype: torch.dtype) -> None:
    tensors = dict(zip(("q", "k", "v", "dout"), inputs(70, 600, (4, 2), 16, dtype), strict=True))
    tensors[name][0, 0, 3, 5] = value
    found = both_ways(CompiledFlash(), *tensors.values(), False)
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
    found, aten = (both_ways(x, q, k, v, dout, False) for x in (CompiledFlash(), CpuFlash()))
    exact = both_ways(Blockwise(), *(x.double() for x in (q, k, v, dout)), False)
    for name in NAMES:
        assert relative(found[name], exact[name]) <= 2 * relative(aten[name], exact[name]), name


@DTYPES
def test_more_threads_change_no_bit(dtype: torch.dtype) -> None:
    arguments = (*inputs(200, 200, (4, 2), 16, dtype), True)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(both_ways(CompiledFlash(), *arguments))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in NAMES)


@pytest.fixture
def switched_on() -> Iterator[None]:
    use_compiled(True)
    yield
    use_compiled(False)


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize(
    ("rows", "width", "dtype", "expected"),
    [
        (128, 16, torch.float32, CompiledFlash),
        (32, 16, torch.bfloat16, CompiledFlash),
        (31, 16, torch.bfloat16, CpuFlash),
        (127, 16, torch.float32, CpuFlash),
        (128, 15, torch.bfloat16, CpuFlash),
        (128, 16, torch.float64, CpuFlash),
        (128, 16, torch.float16, CpuFlash),
    ],
)
def test_it_is_taken_where_it_pays(
    rows: int, width: int, dtype: torch.dtype, expected: type
) -> None:
    assert isinstance(choose_kernel(torch.zeros(1, 1, rows, width, dtype=dtype)), expected)


@pytest.mark.usefixtures("switched_on")
def test_a_cpu_without_its_units_keeps_atens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_flash, "_has", lambda capability: capability == "avx512_f")
    assert isinstance(choose_kernel(torch.zeros(1, 1, 128, 16).bfloat16()), CpuFlash)
    assert isinstance(choose_kernel(torch.zeros(1, 1, 128, 16)), CompiledFlash)


def test_a_helper_lets_it_take_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests over ranks that use it would test aten's."""
    use_compiled_attention(monkeypatch)
    assert isinstance(choose_kernel(torch.zeros(1, 1, 1, 8)), CompiledFlash)


def build_anew(monkeypatch: pytest.MonkeyPatch, folder: Path) -> object:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return cpu_flash._library.__wrapped__()


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho no room left >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match=r"(?s)no room left.*leave train\.compile out"):
        build_anew(monkeypatch, tmp_path)
    monkeypatch.delenv("CXX")
    assert build_anew(monkeypatch, tmp_path)


def test_a_killed_build_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first build writes half a library and hangs; killed, it leaves the lock to the next."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho half > "$last"\nexec sleep 60\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", "from model import cpu_flash; cpu_flash._library()"]
    with subprocess.Popen(command, env=environment, start_new_session=True) as first:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("longhaul/*.unfinished")):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
    assert not list(tmp_path.glob("longhaul/*.so"))
    compiler.write_text('#!/bin/sh\nexec g++ "$@"\n')  # the same command: the same lock and file
    monkeypatch.setenv("CXX", str(compiler))
    assert build_anew(monkeypatch, tmp_path)
    assert len(list(tmp_path.glob("longhaul/*.so"))) == 1
