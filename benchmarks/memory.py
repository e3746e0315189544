"""Peak memory of training against sequence length, for each way to checkpoint, beside transformers.

    python -m benchmarks.memory [--tokens 1024 4096 16384] [--picture memory.png]

Each cell is a process of its own (`benchmarks.step --peak`): the model of that benchmark, bfloat16,
one sample, three steps, and the highest resident memory of the whole process, libraries included;
in brackets its share of transformers' without checkpointing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

WAYS: dict[str, tuple[str, ...]] = {
    "transformers": ("--peak=hf",),
    "transformers, gradient checkpointing": ("--peak=hf-ckpt",),
    "longhaul": ("--peak=ours",),
    "longhaul, selective": ("--peak=ours", "--checkpointing=selective"),
    "longhaul, block": ("--peak=ours", "--checkpointing=block"),
    "longhaul, block, ffn_chunk 1024": (
        "--peak=ours",
        "--checkpointing=block",
        "--ffn-chunk=1024",
    ),
}


def peak(words: tuple[str, ...], tokens: int) -> float | None:
    """Return GiB; None where it failed, as it does where memory runs out."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step", "--compile", *words]
    done = subprocess.run(
        [*command, f"--tokens={tokens}"], stdout=subprocess.PIPE, text=True, check=False
    )
    return float(done.stdout.split()[-2]) if done.returncode == 0 else None


def draw(header: list[str], rows: list[list[str]], path: Path) -> None:
    """Plot the table, a line a way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.add_subplot()
    lengths = [int(name.replace(",", "")) for name in header[1:]]
    for name, *cells in rows:
        found = [float(cell.split()[0]) if cell != "failed" else float("nan") for cell in cells]
        style = "--" if name.startswith("transformers") else "-"
        axes.plot(lengths, found, style, marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a sample")
    axes.set_ylabel("peak memory of the process, GiB")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--ways", default="", help="a pattern of their names; all, if left out")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    header = ["peak memory, GiB", *(f"{tokens:,}" for tokens in options.tokens)]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    rows: list[list[str]] = []
    of_peer: dict[int, float | None] = {}
    for name, words in WAYS.items():
        if not re.search(options.ways, name):
            continue
        row = [name]
        for tokens in options.tokens:
            found = peak(words, tokens)
            whole = of_peer.setdefault(tokens, found if name == "transformers" else None)
            share = f" ({found / whole:.2f})" if found and whole else ""
            row.append(f"{found:.2f}{share}" if found else "failed")
        print(f"| {' | '.join(row)} |", flush=True)
        rows.append(row)
    if options.picture is not None:
        draw(header, rows, options.picture)


if __name__ == "__main__":
    main()
