"""A key further back than the window reaches: recalled with FAM, not with a window.

python benchmarks/passkey.py [--steps 2500] [--distance 4] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import time

import torch

from model.config import FamMemory, MemoryConfig, WindowMemory
from train.evaluation.passkey import recall, train_passkey

MEMORIES: dict[str, MemoryConfig] = {
    "window 1": WindowMemory(1),
    "fam norm": FamMemory(8, 0, "norm"),
    "fam latch": FamMemory(8, 0, "latch"),
    "fam paper": FamMemory(8, 0, "paper"),
}


def main() -> None:
    """Print a markdown table row for each memory and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", choices=MEMORIES, nargs="*", default=list(MEMORIES))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--distance", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    distances = [0, 1, 2, 3, 4, 6, 8, 16]
    print("| memory | seed | CPU s |" + "".join(f" {d} |" for d in distances), flush=True)
    print("|" + " --- |" * (len(distances) + 3), flush=True)
    for seed in args.seeds:
        for name in args.memory:
            began = time.process_time()
            model = train_passkey(
                MEMORIES[name],
                seed=seed,
                distance=args.distance,
                max_steps=args.steps,
                say=lambda text: print(text, flush=True),
            )
            seconds = time.process_time() - began
            cells = [f" {recall(model, distance=d, seed=1):.2f} |" for d in distances]
            print(f"| {name} | {seed} | {seconds:.0f} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
