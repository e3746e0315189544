"""Loss and attention by themselves, forward and backward, beside torch's own.

    python benchmarks/parts.py [--rounds 5]
    python benchmarks/parts.py --peak "chunked loss"      one of them alone: MiB above its inputs

Loss: 8192 rows of width 512, vocabulary 32000, bfloat16, compiled, beside the eager cross entropy
of logits in float32. Attention: 8 query and 4 key heads of 64, causal, `model.fold` beside
scaled_dot_product_attention, which runs the same kernel. One thread, CPU seconds, medians of
alternating rounds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from model.attention import Alone, Whole
from model.compiled import use_compiled
from model.fold import fold
from model.local import LocalLinears
from model.loss import chunked_loss, columns_of

ROWS, WIDTH, VOCAB = 8192, 512, 32000
Run = Callable[[], None]


def losses() -> dict[str, Run]:
    """Return the ways to the loss and both gradients."""
    hidden = torch.randn(ROWS, WIDTH).bfloat16().requires_grad_()
    weight = (torch.randn(VOCAB, WIDTH) / WIDTH**0.5).bfloat16().requires_grad_()
    labels, scale = torch.randint(0, VOCAB, (ROWS,)), torch.tensor(1 / ROWS)
    columns = columns_of(LocalLinears(), VOCAB, VOCAB)

    def chunked() -> None:
        loss, _ = chunked_loss(hidden, weight, labels, scale, chunk=1024, columns=columns)
        torch.autograd.grad(loss, (hidden, weight))

    def eager() -> None:
        loss = functional.cross_entropy((hidden @ weight.t()).float(), labels)
        torch.autograd.grad(loss, (hidden, weight))

    return {"chunked loss": chunked, "eager cross entropy": eager}


def attentions(tokens: int, dtype: torch.dtype) -> dict[str, Run]:
    """Return the ways to causal attention of one sample and its gradients."""
    shapes = ((1, 1, tokens, heads, 64) for heads in (8, 4, 4))
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    upstream = torch.randn(q.shape, dtype=dtype)

    def ours() -> None:
        out = fold(q, k, v, layout=Whole(), exchange=Alone())
        torch.autograd.grad(out, (q, k, v), upstream)

    def torchs() -> None:
        heads: list[Tensor] = [x[0].transpose(1, 2) for x in (q, k, v)]
        out = functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), upstream[0].transpose(1, 2))

    return {"fold": ours, "scaled_dot_product_attention": torchs}


def alternate(ways: dict[str, Run], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each; the first two of each are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 2):
        for name, run in ways.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: median(found[2:]) for name, found in seconds.items()}


def peak(name: str) -> float:
    """Return the MiB that a way takes above what is there before it, its gradients included."""
    run = losses()[name]
    functional.cross_entropy(torch.randn(64, 64).requires_grad_(), torch.zeros(64).long())
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = psutil.Process().memory_info().rss
    run()
    status = Path("/proc/self/status").read_text()  # getrusage's would be the parent's, if larger
    highest = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return float(highest.split()[1]) / 1024 - before / 2**20


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    use_compiled(True)
    if options.peak:
        if options.peak.startswith("chunked"):  # compile first, on few rows of other sizes
            hidden, weight = torch.randn(6, 16).bfloat16(), torch.randn(40, 16).bfloat16()
            columns, scale = columns_of(LocalLinears(), 40, 40), torch.tensor(1.0)
            labels = torch.zeros(6, dtype=torch.int64)
            args = (hidden, weight.requires_grad_(), labels, scale)
            chunked_loss(*args, chunk=6, columns=columns)[0].backward()
        print(f"{peak(options.peak):.0f}")
        return
    print("| loss | s | times as fast | MiB | share |\n| --- | --- | --- | --- | --- |")
    seconds = alternate(losses(), options.rounds)
    held = {}
    for name in seconds:
        words = [sys.executable, __file__, "--peak", name]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        held[name] = float(done.stdout)
    last = list(seconds)[-1]
    for name, found in seconds.items():
        faster, share = seconds[last] / found, held[name] / held[last]
        print(f"| {name} | {found:.2f} | {faster:.2f} | {held[name]:.0f} | {share:.2f} |")
    print("\n| attention | tokens | ms | sdpa, ms | ratio |\n| --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1024, 4096, 16384):
            ours, torchs = alternate(attentions(tokens, dtype), options.rounds).values()
            name = str(dtype).removeprefix("torch.")
            cells = f"{1e3 * ours:.1f} | {1e3 * torchs:.1f} | {torchs / ours:.2f}"
            print(f"| {name} | {tokens} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
