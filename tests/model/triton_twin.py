"""Run by test_grouped_triton.py in a process whose Triton interprets: prints errors as JSON."""

import json
import os
import sys

import torch
from torch import Tensor

from model.memory.grouped_softmax import GroupedSoftmax
from tests.compare import relative

CASES: dict[str, tuple[int, int, int, tuple[int, int], bool, int, str]] = {
    # block, query rows, keys, heads and key heads, causal, head_dim, type
    "tiles of whole blocks": (16, 160, 160, (4, 2), True, 16, "float32"),
    "tiles that cut blocks": (13, 130, 130, (2, 2), True, 32, "float32"),
    "a block longer than a tile": (65, 195, 195, (2, 1), True, 16, "float32"),
    "one block": (12, 12, 12, (2, 1), True, 16, "float32"),
    "past blocks": (16, 70, 48, (4, 2), False, 16, "float32"),
    "few past keys": (3, 7, 9, (6, 1), False, 16, "float32"),
    "half precision": (32, 96, 96, (2, 1), True, 64, "float16"),
}


def inputs(name: str) -> tuple[list[Tensor], Tensor]:
    """Return (q, k, v, dout) and dlse in float64, rounded to what the case's type holds."""
    _, rows, keys, (heads, kv_heads), _, dims, dtype = CASES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, m, dims) for n, m in ((heads, rows), *[(kv_heads, keys)] * 2, (heads, rows))]
    given = [torch.randn(*shape, generator=generator) for shape in shapes]
    dlse = torch.randn(2, heads, rows, generator=generator)
    return [x.to(getattr(torch, dtype)).double() for x in given], dlse.double()


def errors(name: str) -> dict[str, float]:
    """Return the relative error of each result; some rows have read nothing (lse of +inf)."""
    from model.memory.grouped_triton import GroupedTriton

    block, _, _, _, causal, _, dtype = CASES[name]
    (q, k, v, dout), dlse = inputs(name)
    slow, fast = GroupedSoftmax(block), GroupedTriton(block)
    out, lse = slow.forward(q, k, v, causal)
    narrow = [x.to(getattr(torch, dtype)) for x in (q, k, v, dout)]
    own_out, own_lse = fast.forward(*narrow[:3], causal)
    assert own_out.dtype == narrow[0].dtype
    assert own_lse.dtype == torch.float32
    found = {"out": relative(own_out, out), "lse": relative(own_lse, lse)}
    hidden, said = lse.clone(), (dout * out).sum(-1) - dlse
    hidden[:, :, 1::5] = float("inf")
    expected = slow.backward_of_both(dout, q, k, v, said, hidden, causal)
    q, k, v, dout = narrow
    grads = fast.backward_of_both(dout, q, k, v, said.float(), hidden.float(), causal)
    for label, own, other in zip(("dq", "dk", "dv"), grads, expected, strict=True):
        assert own.dtype == q.dtype
        found[label] = relative(own, other)
    assert not grads[0][:, :, 1::5].any()
    return found


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    torch.set_num_threads(1)
    json.dump({name: errors(name) for name in CASES}, sys.stdout)
