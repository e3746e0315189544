"""How long it takes to begin: the command line, imports, the first step; memory of an idle rank.

    python -m benchmarks.startup [--rounds 5]

Each row starts a new process; wall seconds, medians of alternating rounds behind one that is not
counted, files in the page cache. Runs that train take part in three rounds at most.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 3
"""Rounds of a run that trains."""

CLI = "from train.cli import main; main()"
IDLE = """
import resource
from datetime import timedelta
from parallel.mesh import build_mesh, start_processes
from train.build import build, to_model_config
from train.settings.config import load
start_processes(timedelta(minutes=1))
config = load({path!r}, [])
build(config, to_model_config(config, 256), build_mesh(tp=1, cp=1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
RUN = """
name: startup
run_dir: {folder}/run
model: {{num_layers: 2, hidden_size: 64, num_heads: 2, num_kv_heads: 2, ffn_size: 128,
        memory: {{name: fam}}}}
data: {{train: {folder}/shards/train, segment_len: 64, sample_len: 256}}
parallel: {{tp: 1, cp: 1, zero: {zero}}}
train: {{steps: 1, batch_size: 1, micro_batch: 1, lr: 1.0e-3, warmup_steps: 0, compile: {compile}}}
tracking: {{enabled: false}}
"""


def command(*words: str) -> list[str]:
    """Return the command line with these words."""
    return [sys.executable, "-c", CLI, *words]


def python(code: str) -> list[str]:
    """Return python with this program."""
    return [sys.executable, "-c", code]


def timed(words: list[str]) -> tuple[float, str]:
    """Return a command's wall seconds and output; it must succeed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout


def write(folder: Path, name: str, *, zero: int, compiled: bool) -> str:
    """Write a configuration of one step; return its path."""
    path = folder / name
    path.write_text(RUN.format(folder=folder, zero=zero, compile=str(compiled).lower()))
    return str(path)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "book.txt"
        text.write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 400)
        timed(
            command("prepare", str(text), "--output", str(folder / "shards"), "--valid-fraction=0")
        )
        plain = write(folder, "plain.yaml", zero=1, compiled=False)
        compiled = write(folder, "compiled.yaml", zero=1, compiled=True)
        ways = {
            "python, nothing imported": python("pass"),
            "`longhaul --help`": command("--help"),
            "`longhaul plan FILE`": command("plan", plain, "--gpus=1", "--vocab-size=256"),
            "import torch": python("import torch"),
            "import transformers' LlamaForCausalLM": python(
                "from transformers import LlamaForCausalLM"
            ),
            "import of all that `pretrain` needs": python("import train.pretrain"),
            "`longhaul pretrain`, 1 step, saved": command("pretrain", plain, "--fresh"),
            "the same, compiled (kernels cached)": command("pretrain", compiled, "--fresh"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, words in ways.items():
                if number > MOST and "--fresh" in words:
                    continue
                seconds[name].append(timed(words)[0])
        print("| start | seconds |\n| --- | --- |")
        for name, found in seconds.items():
            print(f"| {name} | {statistics.median(found[1:]):.2f} |")
        idle = int(timed(python(IDLE.format(path=plain)))[1].split()[-1])
        bare = "import resource, torch; print(resource.getrusage(0).ru_maxrss)"
        torch_alone = int(timed(python(bare))[1])
        print("\n| memory of | MiB |\n| --- | --- |")
        print(f"| torch imported | {torch_alone / 1024:.0f} |")
        print(f"| a rank that has built 0.1M parameters (peak) | {idle / 1024:.0f} |")


if __name__ == "__main__":
    main()
