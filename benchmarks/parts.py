"""Loss and attention by themselves, forward and backward, beside torch's own.

    python -m benchmarks.parts [--only loss|attention] [--rounds 5]
    python -m benchmarks.parts --only loss --vocab 32000 128256 --chunk 256 1024 0 --rows 2048

Loss: rows of width 512, bfloat16, compiled, in chunks of rows (0: all at once), beside the eager
cross entropy of logits in float32; MiB are a process's own peak above the inputs, gradients
included. Attention: 8 query and 4 key heads of 64, causal, `model.fold` beside
scaled_dot_product_attention, which runs aten's kernel (the fold that of train.compile), on views of
tensors as a projection leaves them (the fold's own inputs) and on tensors that lie as the kernel
wants them. One thread, CPU seconds, medians of alternating rounds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
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

WIDTH = 512
EAGER = "eager cross entropy"
Run = Callable[[], None]


def losses(rows: int, vocab: int, chunks: list[int]) -> dict[str, Run]:
    """Return the ways to the loss and both gradients."""
    hidden = torch.randn(rows, WIDTH).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, WIDTH) / WIDTH**0.5).bfloat16().requires_grad_()
    labels, scale = torch.randint(0, vocab, (rows,)), torch.tensor(1 / rows)
    columns = columns_of(LocalLinears(), vocab, vocab)

    def chunked(chunk: int) -> None:
        loss, _ = chunked_loss(hidden, weight, labels, scale, chunk=chunk, columns=columns)
        torch.autograd.grad(loss, (hidden, weight))

    def eager() -> None:
        loss = functional.cross_entropy((hidden @ weight.t()).float(), labels)
        torch.autograd.grad(loss, (hidden, weight))

    return {name_of(chunk): partial(chunked, chunk or rows) for chunk in chunks} | {EAGER: eager}


def name_of(chunk: int) -> str:
    """Return the name of a loss in chunks."""
    return f"chunks of {chunk}" if chunk else "one chunk"


def attentions(tokens: int, dtype: torch.dtype) -> dict[str, Run]:
    """Return the ways to causal attention of one sample and its gradients, ours first."""
    shapes = ((1, 1, tokens, heads, 64) for heads in (8, 4, 4))
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    upstream = torch.randn(q.shape, dtype=dtype)

    def ours() -> None:
        out = fold(q, k, v, layout=Whole(), exchange=Alone())
        torch.autograd.grad(out, (q, k, v), upstream)

    views = [x[0].transpose(1, 2) for x in (q, k, v, upstream)]
    laid = [x.detach().clone(memory_format=torch.contiguous_format) for x in views]

    def torchs(of: list[Tensor]) -> None:
        heads = [x.detach().requires_grad_() for x in of[:3]]
        out = functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, heads, of[3])

    return {"fold": ours, "views": partial(torchs, views), "contiguous": partial(torchs, laid)}


def alternate(ways: dict[str, Run], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each; the first two of each are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 2):
        for name, run in ways.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: median(found[2:]) for name, found in seconds.items()}


def peak(run: Run) -> float:
    """Return the MiB that a way takes above what is there before it, its gradients included."""
    functional.cross_entropy(torch.randn(64, 64).requires_grad_(), torch.zeros(64).long())
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = psutil.Process().memory_info().rss
    run()
    status = Path("/proc/self/status").read_text()  # getrusage's would be the parent's, if larger
    highest = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return float(highest.split()[1]) / 1024 - before / 2**20


def compile_loss() -> None:
    """Compile the chunked loss, on few rows of other sizes."""
    hidden, weight = torch.randn(6, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    columns, scale = columns_of(LocalLinears(), 40, 40), torch.tensor(1.0)
    args = (hidden, weight.requires_grad_(), torch.zeros(6, dtype=torch.int64), scale)
    chunked_loss(*args, chunk=6, columns=columns)[0].backward()


def held(name: str, rows: int, vocab: int, chunks: list[int]) -> float:
    """Return `peak` of one way in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.parts", "--peak", name]
    words += [f"--rows={rows}", f"--vocab={vocab}", "--chunk", *map(str, chunks)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def print_losses(rows: int, vocabs: list[int], chunks: list[int], rounds: int) -> None:
    """Print time and memory of each chunk and of eager, for each vocabulary."""
    print("| loss | s | times as fast | MiB | share |\n| --- | --- | --- | --- | --- |")
    for vocab in vocabs:
        seconds = alternate(losses(rows, vocab, chunks), rounds)
        mib = {name: held(name, rows, vocab, chunks) for name in seconds}
        for name, found in seconds.items():
            faster, share = seconds[EAGER] / found, mib[name] / mib[EAGER]
            print(
                f"| {name}, {rows} x {vocab} | {found:.2f} | {faster:.2f} | {mib[name]:.0f} |"
                f" {share:.2f} |",
                flush=True,
            )


def print_attentions(rounds: int) -> None:
    """Print the fold's times and torch's."""
    print("| attention | tokens | fold, ms | sdpa, views | sdpa, contiguous | times as fast |")
    print("| --- | --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1024, 4096, 16384):
            ours, *peers = alternate(attentions(tokens, dtype), rounds).values()
            name = str(dtype).removeprefix("torch.")
            cells = " | ".join(f"{1e3 * found:.1f}" for found in (ours, *peers))
            print(f"| {name} | {tokens} | {cells} | {min(peers) / ours:.2f} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["loss", "attention"])
    parser.add_argument("--rows", type=int, default=8192, help="of the loss")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000])
    parser.add_argument("--chunk", type=int, nargs="+", default=[256, 1024, 0])
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    use_compiled(True)
    if options.peak:
        if options.peak != EAGER:
            compile_loss()
        print(f"{peak(losses(options.rows, options.vocab[0], options.chunk)[options.peak]):.0f}")
        return
    if options.only != "attention":
        print_losses(options.rows, options.vocab, options.chunk, options.rounds)
        print()
    if options.only != "loss":
        print_attentions(options.rounds)


if __name__ == "__main__":
    main()
