"""Every benchmark in one command, with a report and its plots.

    python -m benchmarks [NAME ...] [--output runs/benchmarks] [--list]

Runs one after another what `--list` names (about three hours in all; leave the machine alone), and
writes OUTPUT/report.md: date and machine, and what each printed. What it draws lies beside it.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from benchmarks.memory import draw

ROOT = Path(__file__).resolve().parents[1]


class Table(NamedTuple):
    """A table that a benchmark printed."""

    header: list[str]
    rows: list[list[str]]


class Part(NamedTuple):
    """A benchmark: its words after `python -m`, and the plot of its first table."""

    words: tuple[str, ...]
    plot: Callable[[Table, Path], None] | None = None


def numbers(cell: str) -> list[float]:
    """Return the numbers of a cell: `66.8 (1.01)` has two."""
    return [float(found.replace(",", "")) for found in re.findall(r"-?[\d,]*\.?\d+", cell)]


def draw_bars(column: int, label: str) -> Callable[[Table, Path], None]:
    """Return a plot of one column's numbers, a bar a row."""

    def plot(table: Table, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 0.5 + 0.4 * len(table.rows)), layout="tight")
        axes = figure.add_subplot()
        names = [row[0] for row in table.rows]
        axes.barh(names, [numbers(row[column])[0] for row in table.rows])
        axes.axvline(1.0, color="grey", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        figure.savefig(path, dpi=120)

    return plot


def draw_lengths(table: Table, path: Path) -> None:
    """Plot a chunk's time at each length, a line a memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.add_subplot()
    lengths = [numbers(name)[0] for name in table.header[2:-1]]
    for row in table.rows:
        if row[1] == "a chunk, ms":
            axes.plot(lengths, [numbers(cell)[0] for cell in row[2:-1]], marker=".", label=row[0])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens read before")
    axes.set_ylabel("ms for the next 512")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


_STEP = draw_bars(2, "tokens per CPU second in those of the best peer")
SUITE: dict[str, Part] = {
    **{
        f"step-{precision}-{tokens}": Part(
            ("benchmarks.step", "--compile", f"--precision={precision}", f"--tokens={tokens}"),
            _STEP,
        )
        for precision, tokens in (("bf16", 1024), ("bf16", 4096), ("fp32", 1024))
    },
    "step-fam-4096": Part(
        ("benchmarks.step", "--compile", "--memory=fam", "--segment=512", "--tokens=4096"), _STEP
    ),
    "parts": Part(("benchmarks.parts",), draw_bars(2, "times as fast as eager")),
    "loss-128k": Part(
        ("benchmarks.parts", "--only=loss", "--vocab=128256"),
        draw_bars(2, "times as fast as eager"),
    ),
    "memory": Part(("benchmarks.memory",), lambda table, path: draw(*table, path)),
    **{
        f"ring-{precision}-{tokens}": Part(
            ("benchmarks.ring", f"--precision={precision}", f"--tokens={tokens}")
        )
        for precision in ("fp32", "bf16")
        for tokens in (8192, 16384)
    },
    "ring-cp4": Part(("benchmarks.ring", "--cp=4")),
    "ring-memories": Part(("benchmarks.ring_memories",)),
    "segments": Part(("benchmarks.segments",), draw_bars(3, "in turn / at once")),
    "length": Part(("benchmarks.length",), draw_lengths),
    "data": Part(("benchmarks.data_loader",)),
    "shuffle": Part(("benchmarks.shuffle",)),
    "packing": Part(("benchmarks.packing",)),
    "ledger": Part(("benchmarks.ledger",)),
    "checkpoints": Part(("benchmarks.checkpoints", "240")),
    "tracking": Part(("benchmarks.tracking",)),
    "startup": Part(("benchmarks.startup",), draw_bars(1, "seconds")),
}


def first_table(text: str) -> Table | None:
    """Return the first table of a text; None where there is none."""
    found = re.search(r"(?:^\|.*\|\n){3,}", text, re.MULTILINE)
    if found is None:
        return None
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in found.group().strip().splitlines()
    ]
    return Table(rows[0], rows[2:])


def machine() -> str:
    """Return the machine in a line."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = names[0] if names else model
    load = psutil.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores of {model}, {psutil.virtual_memory().total / 2**30:.0f} GiB, torch"
        f" {torch.__version__}, Python {platform.python_version()}, load {load:.1f} before"
    )


def measure(name: str, part: Part, output: Path) -> str:
    """Run one benchmark; return its section of the report."""
    words = [sys.executable, "-W", "ignore", "-m", *part.words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    section = f"## {name} (`python -m {' '.join(part.words)}`)\n\n"
    if done.returncode:
        return f"{section}Failed with exit code {done.returncode}:\n\n    {done.stderr[-500:]}\n"
    table = first_table(done.stdout)
    if part.plot is not None and table is not None:
        part.plot(table, output / f"{name}.png")
        section += f"![{name}]({name}.png)\n\n"
    return section + done.stdout


def main() -> None:
    """Run the suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of --list; all, if left out")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--list", action="store_true", help="names and commands")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in SUITE]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(SUITE)}")
    chosen = {name: SUITE[name] for name in options.names or SUITE}
    if options.list:
        for name, part in chosen.items():
            print(f"{name:16} python -m {' '.join(part.words)}")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    report = options.output / "report.md"
    report.write_text(f"# Benchmarks, {datetime.now(UTC):%Y-%m-%d}\n\n{machine()}\n")
    for name, part in chosen.items():
        print(f"{name}: python -m {' '.join(part.words)}", flush=True)
        with report.open("a") as file:
            file.write(f"\n{measure(name, part, options.output)}")
    print(f"{report}: written")


if __name__ == "__main__":
    main()
