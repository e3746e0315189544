"""Does memory help on real text? Loss by position for each memory, on and off, over seeds.

    python benchmarks/learning.py prepare BOOKS/train BOOKS/valid FOLDER
    python benchmarks/learning.py run FOLDER --memory fam-norm --seed 0 [--steps 400]
    python benchmarks/learning.py table FOLDER

Equal width, depth, tokens and order of data; one process, one thread, plain AdamW. `run` appends
to FOLDER/results.jsonl. Held-out books are read from their first token on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from data.index import Corpus
from data.loader import load
from data.prepare import prepare
from data.streams import IGNORE, Streams
from data.tokenizer import TokenizerTraining, load_tokenizer
from model.config import FamMemory, MemoryConfig, ModelConfig, NoMemory, WindowMemory
from model.decoder import Decoder
from model.init import count_parameters, initialise
from model.memory.base import detach

SEGMENT, SEGMENTS, LANES, VOCAB = 64, 16, 8, 2048
MEMORIES: dict[str, MemoryConfig] = {
    "none": NoMemory(),
    "window": WindowMemory(1),
    "fam-paper": FamMemory(16, 0, "paper"),
    "fam-norm": FamMemory(16, 0, "norm"),
    "fam-latch": FamMemory(16, 0, "latch"),
    "fam-norm-window": FamMemory(16, 1, "norm"),
}
EDGES = [0, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 1 << 40]


def train(folder: Path, memory: str, seed: int, steps: int, lr: float) -> dict[str, object]:
    """Train one model; return its losses."""
    torch.set_num_threads(1)
    corpus, valid = (
        Corpus.open(folder / "train" / "train"),
        Corpus.open(folder / "valid" / "train"),
    )
    config = ModelConfig(VOCAB, 4, 128, 4, 2, 344, 32, memory=MEMORIES[memory])
    model = Decoder(config)
    initialise(model, config, seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    streams = Streams(
        corpus.lengths, seed=seed, lanes=LANES, segment_len=SEGMENT, segments=SEGMENTS
    )
    state, began = None, time.process_time()
    batches = load(
        corpus,
        streams,
        position=0,
        dp_rank=0,
        dp_size=1,
        micro_batch=LANES,
        workers=0,
        steps=steps,
    )
    for step, (batch,) in enumerate(batches):
        warm = min(1.0, (step + 1) / 40)
        rate = lr * warm * (0.55 + 0.45 * np.cos(np.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        scale = 1.0 / (batch.labels != IGNORE).sum()
        output = model(batch.tokens, batch.starts, state, labels=batch.labels, scale=scale)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = detach(output.state)
        if step % 25 == 0:
            print(f"{memory} seed {seed} step {step} loss {output.loss.item():.3f}", flush=True)
    seconds = time.process_time() - began
    return {
        "memory": memory,
        "seed": seed,
        "steps": steps,
        "lr": lr,
        "parameters": count_parameters(config),
        "tokens": steps * LANES * SEGMENT * SEGMENTS,
        "cpu_s": round(seconds),
        "on": by_position(model, valid, memory=True),
        "off": by_position(model, valid, memory=False),
    }


@torch.no_grad()
def by_position(
    model: Decoder, corpus: Corpus, *, memory: bool, tokens: int = 32768
) -> list[float]:
    """Return the mean loss between each two EDGES of the position, over every book's beginning."""
    books = len(corpus.lengths)
    rows = torch.stack(
        [torch.from_numpy(corpus.read(book, 0, tokens + 1)) for book in range(books)]
    )
    length = SEGMENT * SEGMENTS
    losses, state = [], None
    for first in range(0, tokens, length):
        part = rows[:, first : first + length + 1]
        shape = (books, SEGMENTS, SEGMENT)
        starts = torch.full(shape[:2], not memory)
        output = model(
            part[:, :-1].reshape(shape),
            starts,
            state,
            labels=part[:, 1:].reshape(shape),
            scale=torch.ones(()),
        )
        state = output.state
        losses.append(output.token_losses.flatten(1))
    curve = torch.cat(losses, 1).mean(0)
    return [
        curve[low:high].mean().item()
        for low, high in zip(EDGES, EDGES[1:], strict=False)
        if low < tokens
    ]


def table(folder: Path) -> str:
    """Return markdown: loss by position over seeds, then differences paired by seed."""
    runs: dict[str, dict[int, dict[str, list[float]]]] = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        runs.setdefault(row["memory"], {})[row["seed"]] = row
    names = [f"{low}-{high}" for low, high in zip(EDGES[:-2], EDGES[1:-1], strict=True)]
    names.append(f"{EDGES[-2]}-")
    head = " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1)
    text = "| loss, mean over seeds | " + head
    for memory, seeds in runs.items():
        for kind in ("on", "off"):
            rows = [seeds[seed][kind] for seed in sorted(seeds)]
            text += f"\n| {memory}, {kind} ({len(rows)}) |" + _cells(rows, spread=False)
    text += "\n\n| difference, mean ± standard error | " + head
    for memory, seeds in runs.items():
        if memory == "none":
            continue
        for label, other, kind in (("none", runs["none"], "on"), ("its own off", seeds, "off")):
            both = sorted(seeds.keys() & other.keys())
            rows = [
                [b - a for a, b in zip(seeds[s]["on"], other[s][kind], strict=True)] for s in both
            ]
            text += f"\n| {label} - {memory} ({len(rows)}) |" + _cells(rows, spread=True)
    return text


def _cells(rows: list[list[float]], *, spread: bool) -> str:
    cells = []
    for values in zip(*rows, strict=True):
        cell = f" {statistics.mean(values):.3f}"
        if spread and len(values) > 1:
            cell += f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"
        cells.append(cell + " |")
    return "".join(cells)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("prepare", "run", "table"):
        command = commands.add_parser(name)
        if name == "prepare":
            command.add_argument("books", type=Path)
            command.add_argument("held_out", type=Path)
        command.add_argument("folder", type=Path)
        if name == "run":
            command.add_argument("--memory", choices=MEMORIES, required=True)
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--steps", type=int, default=400)
            command.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(
            [args.books],
            args.folder / "train",
            tokenizer=TokenizerTraining(VOCAB),
            valid_fraction=0.0,
        )
        tokenizer = load_tokenizer(args.folder / "train" / "train" / "tokenizer.json")
        prepare([args.held_out], args.folder / "valid", tokenizer=tokenizer, valid_fraction=0.0)
    elif args.command == "run":
        result = train(args.folder, args.memory, args.seed, args.steps, args.lr)
        with (args.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
    else:
        print(table(args.folder))


if __name__ == "__main__":
    main()
