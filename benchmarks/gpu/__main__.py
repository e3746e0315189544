"""Runs the parts one after another and says what failed; see the package."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import benchmarks.gpu

PARTS = {
    "kernels": "correctness",
    "fp8": "correctness",
    "memories": "correctness",
    "ring": "attention",
    "grouped": "attention",
    "chain": "layers",
    "diagonals": "layers",
    "graphs": "streams",
    "streaming": "streams",
    "step_8k": "steps",
    "step_32k": "steps",
    "step_128k": "steps",
}
"""Each part and the module that has a function of its name."""

WRONG = 3
"""Exit status of a part that ran, with rows that are wrong or failed."""

TAIL = 30
"""Lines of what a failed part said that go into the report."""


def chosen(words: str) -> list[str]:
    """Return the parts that are asked for; `step` is all of its lengths."""
    found = []
    for word in words.split(","):
        named = [part for part in PARTS if part == word or part.startswith(f"{word}_")]
        if not named:
            raise SystemExit(f"no part {word}: there are {', '.join(PARTS)}")
        found += named
    return found


def measure(part: str, options: argparse.Namespace) -> None:
    """Run one part in this process; add its rows to the report."""
    from benchmarks.gpu.measure import Error, Failed, Options, describe

    began, wrong, width = time.monotonic(), 0, 0
    run = getattr(importlib.import_module(f"benchmarks.gpu.{PARTS[part]}"), part)
    with (options.output / "gpu.md").open("a", encoding="utf-8") as report:
        print(f"\n## {part}\n\n{inspect.getdoc(run)}\n\n{describe()}\n", file=report, flush=True)
        for number, row in enumerate(run(Options(options.tiny, options.rounds))):
            wrong += sum(isinstance(cell, Error) and cell.wrong for cell in row)
            wrong += sum(isinstance(cell, Failed) for cell in row)
            width = width or len(row)
            line = f"| {' | '.join(map(str, [*row, *[''] * (width - len(row))]))} |"
            print(line, file=report, flush=True)
            if number == 0:
                print("| --- " * len(row) + "|", file=report, flush=True)
            print(f"{part} {time.monotonic() - began:.0f} s {line}", flush=True)
    if wrong:
        sys.exit(WRONG)


def start(part: str, options: argparse.Namespace) -> str:
    """Run one part in a process of its own; return "" or what went wrong."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--part", part]
    words += ["--output", str(options.output), "--rounds", str(options.rounds)]
    words += ["--tiny"] * options.tiny
    environment = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # as slurm/lib.sh sets it for runs
        "NCCL_SOCKET_IFNAME": "lo",  # one rank, perhaps on a machine without network
    } | os.environ
    log = options.output / "stderr.log"
    with log.open("a", encoding="utf-8") as said:
        print(f"==== {part}", file=said, flush=True)
        behind = said.tell()
        process = subprocess.Popen(words, stderr=said, env=environment)
        try:
            code = process.wait(options.limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"not done after {options.limit:g} s"
        except BaseException:
            process.kill()
            raise
    if code in (0, WRONG):
        return "rows failed, or errors above their tolerance" if code else ""
    said_here = log.read_bytes()[behind:].decode(errors="replace")
    tail = said_here.splitlines()[-TAIL:]
    text = "\n".join(["", f"{part} failed with exit status {code}:", "", *tail])
    print(text, file=sys.stderr)
    with (options.output / "gpu.md").open("a", encoding="utf-8") as report:
        print(text.replace("\n", "\n    "), file=report)
    return f"exit status {code}"


def main() -> None:
    """Run the parts, each in its own process, and write the report."""
    parser = argparse.ArgumentParser(
        description=benchmarks.gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="kernels,memories,...")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--limit", type=float, default=560.0, help="seconds of each part")
    parser.add_argument("--rounds", type=int, default=5, help="that count")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        try:
            measure(options.part, options)
        except ModuleNotFoundError as missing:
            sys.exit(
                f"the part {options.part} imports {missing.name}, which is not installed here;"
                " bring its wheel, as the docstring of benchmarks/gpu/__init__.py says"
            )
        return
    parts = chosen(options.parts)
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("no GPU here; --tiny shows on a CPU that the command works")
    options.output.mkdir(parents=True, exist_ok=True)
    report = options.output / "gpu.md"
    report.write_text("# On one GPU\n", encoding="utf-8")
    (options.output / "stderr.log").write_text("", encoding="utf-8")
    failed = {}
    for part in parts:
        began = time.monotonic()
        trouble = start(part, options)
        failed |= {part: trouble} if trouble else {}
        with report.open("a", encoding="utf-8") as file:
            print(f"\n{part}: {trouble or 'done'}, {time.monotonic() - began:.0f} s", file=file)
    summary = "; ".join(f"{part}: {trouble}" for part, trouble in failed.items())
    summary = f"failed: {summary}" if failed else f"all right: {', '.join(parts)}"
    with report.open("a", encoding="utf-8") as file:
        print(f"\n{summary}", file=file)
    print(summary, flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
