"""Does memory help on real text? Loss by position for each memory, on and off, over seeds.

    python benchmarks/learning.py prepare BOOKS/train BOOKS/valid FOLDER
    python benchmarks/learning.py run FOLDER --memory fam-norm --seed 0 [--steps 250]
    python benchmarks/learning.py table FOLDER

Equal width, depth, tokens and order of data; one process, one thread, plain AdamW. `run` appends
to FOLDER/results.jsonl. Held-out books are read from their first token on: with the memory (on),
reset at every segment (off), and with the memory that another book left at the same place
(shuffled).
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
from model.config import (
    AbcMemory,
    ArmtMemory,
    CmabMemory,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    MemoryConfig,
    ModelConfig,
    NoMemory,
    RmtMemory,
    WindowMemory,
)
from model.decoder import Decoder
from model.init import count_parameters, initialise
from model.memory.base import detach, map_tensors

SEGMENT, SEGMENTS, LANES, VOCAB = 64, 16, 8, 2048
MEMORIES: dict[str, MemoryConfig] = {
    "none": NoMemory(),
    "window": WindowMemory(1),
    "fam-paper": FamMemory(16, 0, "paper"),
    "fam-norm": FamMemory(16, 0, "norm"),
    "fam-latch": FamMemory(16, 0, "latch"),
    "fam-norm-window": FamMemory(16, 1, "norm"),
    "infini": InfiniMemory(),
    "infini-delta": InfiniMemory("delta"),
    "infini-one-rate": InfiniMemory(gate_lr=1.0),
    "abc": AbcMemory(16),
    "cmab": CmabMemory(16),
    "rmt": RmtMemory(16, state="norm"),
    "armt": ArmtMemory(16, 32),
    "hmt": HmtMemory(bank=64, sensory=8, search_dim=32),
}
"""infini-one-rate: gates learn at the model's rate and decay, as where memory was found unused."""
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
    groups = parameter_groups(model, decay_gates=memory == "infini-one-rate")
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
            group["lr"] = rate * group["lr_scale"]
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
        "on": by_position(model, valid, memory="on"),
        "off": by_position(model, valid, memory="off"),
        "shuffled": by_position(model, valid, memory="shuffled"),
        "gates": [
            round(gate, 3)
            for name, p in model.named_parameters()
            if name.endswith("gate")
            for gate in torch.sigmoid(p).tolist()
        ],
    }


def parameter_groups(model: Decoder, *, decay_gates: bool) -> list[dict[str, object]]:
    """Return AdamW's groups: matrices decay; gates learn at their own rate, and decay if asked."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        decays = p.dim() > 1 or (decay_gates and name.endswith("gate"))
        key = (0.1 if decays else 0.0, getattr(p, "lr_scale", 1.0))
        groups.setdefault(key, []).append(p)
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), params in groups.items()
    ]


@torch.no_grad()
def by_position(model: Decoder, corpus: Corpus, *, memory: str, tokens: int = 32768) -> list[float]:
    """Return the mean loss between each two EDGES of the position, over every book's beginning."""
    books = len(corpus.lengths)
    rows = torch.stack(
        [torch.from_numpy(corpus.read(book, 0, tokens + 1)) for book in range(books)]
    )
    segments = 1 if memory == "shuffled" else SEGMENTS
    length = SEGMENT * segments
    losses, state = [], None
    for first in range(0, tokens, length):
        part = rows[:, first : first + length + 1]
        shape = (books, segments, SEGMENT)
        starts = torch.full(shape[:2], memory == "off")
        read, wanted = part[:, :-1].reshape(shape), part[:, 1:].reshape(shape)
        output = model(read, starts, state, labels=wanted, scale=torch.ones(()))
        if memory == "shuffled" and state is not None:
            other = map_tensors(lambda x: x.roll(1, 0), state)
            state, output = (
                output.state,
                model(read, starts, other, labels=wanted, scale=torch.ones(())),
            )
        else:
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
        for kind in ("on", "off", "shuffled"):
            rows = [seeds[seed][kind] for seed in sorted(seeds)]
            text += f"\n| {memory}, {kind} ({len(rows)}) |" + _cells(rows, spread=False)
    text += "\n\n| difference, mean ± standard error | " + head
    for memory, seeds in runs.items():
        if memory == "none":
            continue
        for label, other, kind in (
            ("none", runs["none"], "on"),
            ("its own off", seeds, "off"),
            ("its own shuffled", seeds, "shuffled"),
        ):
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
