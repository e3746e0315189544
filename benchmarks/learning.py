"""Does memory help on real text? Loss by position for each memory, on and off, over seeds.

    python benchmarks/learning.py prepare BOOKS/train BOOKS/valid FOLDER
    python benchmarks/learning.py run FOLDER --memory fam-norm --seed 0 [--steps 250]
    python benchmarks/learning.py table [--picture FILE] >docs/results/learning.md

Equal width, depth, tokens and order of data; one process, one thread, plain AdamW. `run` writes
one file a run under docs/results/learning (--results), from which `table` reads. Held-out books are
read from their first token on: with the memory (on), reset at every segment (off), and with the
memory that another book left at the same place (shuffled).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data.index import Corpus
from data.landmarks import insert_landmarks
from data.loader import load
from data.prepare import prepare
from data.streams import IGNORE, Batch, Streams
from data.tokenizer import TokenizerTraining, load_tokenizer
from model.config import (
    AbcMemory,
    ArmtMemory,
    CmabMemory,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    LandmarkMemory,
    MemoryConfig,
    ModelConfig,
    NoMemory,
    RmtMemory,
    WindowMemory,
)
from model.decoder import Decoder, Output
from model.init import count_parameters, initialise
from model.memory.base import Carried, detach, map_tensors
from parallel.heap import settle_heap

Runs = dict[str, dict[int, dict[str, Any]]]
"""Results by setting and seed."""
PANELS = 4  # side by side
SEGMENT, SEGMENTS, LANES, VOCAB = 64, 16, 8, 2048
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Of n seeds: Student's t for a two-sided 95 % interval."""


class Setting(NamedTuple):
    """A memory and how it is trained."""

    memory: MemoryConfig
    bptt: int = SEGMENTS  # segments with gradient: D + 1 for RMT's "BPTT D"
    carried: bool = True  # from a lane's sample to its next
    decay_gates: bool = False


SETTINGS: dict[str, Setting] = {
    "none": Setting(NoMemory()),
    "window": Setting(WindowMemory(1)),
    "fam-paper": Setting(FamMemory(16, 0, "paper")),
    "fam-norm": Setting(FamMemory(16, 0, "norm")),
    "fam-latch": Setting(FamMemory(16, 0, "latch")),
    "fam-norm-window": Setting(FamMemory(16, 1, "norm")),
    "infini": Setting(InfiniMemory()),
    "infini-delta": Setting(InfiniMemory("delta")),
    "infini-one-rate": Setting(InfiniMemory(gate_lr=1.0), decay_gates=True),
    "abc": Setting(AbcMemory(16)),
    "cmab": Setting(CmabMemory(16)),
    "rmt": Setting(RmtMemory(16, state="norm")),
    "rmt-bptt-0": Setting(RmtMemory(16, state="norm"), bptt=1),
    "rmt-bptt-1": Setting(RmtMemory(16, state="norm"), bptt=2),
    "rmt-bptt-2": Setting(RmtMemory(16, state="norm"), bptt=3),
    "rmt-bptt-3": Setting(RmtMemory(16, state="norm"), bptt=4),
    "rmt-bptt-4": Setting(RmtMemory(16, state="norm"), bptt=5),
    "armt": Setting(ArmtMemory(16, 32)),
    "hmt": Setting(HmtMemory(bank=64, sensory=8, search_dim=32)),
    "landmark": Setting(LandmarkMemory(SEGMENT + 1, retrieve=2, layers="last"), carried=False),
}
"""infini-one-rate: gates learn at the model's rate and decay, as where memory was found unused.

landmark: each segment is a block that its landmark closes, and the top layer retrieves two; the
store is begun anew with each sample of training (a book's grows to gigabytes), kept in evaluation.
"""
HEADING = """# Does memory help on real text, in numbers

Printed by `python benchmarks/learning.py table`, from the result of each run beside this file; the
setting, and what they say, is in docs/results.md. Nats a token by position in the document. In
brackets: seeds. ±: half a 95 % interval over seeds (Student's t), bold where it leaves out zero.
"""
EDGES = [0, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 1 << 40]


def train(folder: Path, name: str, seed: int, steps: int, lr: float) -> dict[str, object]:
    """Train one model; return its losses."""
    torch.set_num_threads(1)
    corpus, valid = (
        Corpus.open(folder / "train" / "train"),
        Corpus.open(folder / "valid" / "train"),
    )
    setting = SETTINGS[name]
    marked = isinstance(setting.memory, LandmarkMemory)
    config = ModelConfig(VOCAB + marked, 4, 128, 4, 2, 344, 32, memory=setting.memory)
    model = Decoder(config)
    initialise(model, config, seed)
    groups = parameter_groups(model, decay_gates=setting.decay_gates)
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
        if marked:
            batch = insert_landmarks(batch, SEGMENT + 1, VOCAB)  # noqa: PLW2901
        optimizer.zero_grad()
        loss = 0.0
        for low in range(0, SEGMENTS, setting.bptt):
            window = slice(low, low + setting.bptt)
            labels = batch.labels[:, window]
            output = model(
                batch.tokens[:, window], batch.starts[:, window], state, labels=labels, scale=scale
            )
            output.loss.backward()
            loss += output.loss.item()
            state = detach(output.state)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not setting.carried:
            state = None
        if step % 25 == 0:
            print(f"{name} seed {seed} step {step} loss {loss:.3f}", flush=True)
    seconds = time.process_time() - began
    return {
        "memory": name,
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
            torch.sigmoid(p).tolist()
            for name, p in model.named_parameters()
            if name.endswith("gate")
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
        batch = Batch(part[:, :-1].reshape(shape), part[:, 1:].reshape(shape), starts, starts, 0)
        if isinstance(model.config.memory, LandmarkMemory):
            batch = insert_landmarks(batch, SEGMENT + 1, VOCAB)

        def read(state: Carried | None, batch: Batch = batch) -> Output:
            output = model(
                batch.tokens, batch.starts, state, labels=batch.labels, scale=torch.ones(())
            )
            assert isinstance(output, Output)
            return output

        output = read(state)
        following = output.state
        if memory == "shuffled" and state is not None:
            output = read(map_tensors(lambda x: x.roll(1, 0), state))
        state = following
        losses.append(output.token_losses[..., :SEGMENT].flatten(1))
    curve = torch.cat(losses, 1).mean(0)
    return [
        curve[low:high].mean().item()
        for low, high in zip(EDGES, EDGES[1:], strict=False)
        if low < tokens
    ]


def read_runs(results: Path) -> Runs:
    """Return the results that are there, by setting and seed."""
    runs: Runs = {}
    for name in SETTINGS:
        for file in sorted(results.glob(f"{name}-[0-9]*.json")):
            row = json.loads(file.read_text(encoding="utf-8"))
            runs.setdefault(name, {})[row["seed"]] = row
    return runs


def plot(runs: Runs, path: Path) -> None:
    """Draw, for each memory, what it gains by position: over none, over itself without its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in runs if name != "none"]
    height = -(-len(shown) // PANELS)
    figure, grid = pyplot.subplots(
        height, PANELS, figsize=(2.8 * PANELS, 2.1 * height), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    places = [(low * high) ** 0.5 for low, high in zip([8, *EDGES[1:-2]], EDGES[1:-1], strict=True)]
    places.append(EDGES[-2] * 2**0.5)
    for axes, name in zip(grid.flat, shown, strict=False):
        for label, other, kind in (
            ("none", runs.get("none", {}), "on"),
            ("off", runs[name], "off"),
            ("another book's", runs[name], "shuffled"),
        ):
            rows = _differences(runs[name], other, kind)
            if rows:
                means, halves = zip(*(_interval(x) for x in zip(*rows, strict=True)), strict=True)
                axes.errorbar(places, means, halves, fmt=".-", lw=1, ms=4, capsize=2, label=label)
        axes.axhline(0.0, color="0.7", lw=1, ls=":")
        many = len(runs[name])
        axes.set_title(f"{name} ({many} seed{'s' * (many > 1)})", fontsize=9)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    grid[0, 0].set(xscale="log", ylim=(-0.45, 0.45))
    grid[0, 0].legend(frameon=False, fontsize=7)
    figure.supxlabel("position in the document, tokens", fontsize=9)
    figure.supylabel("nats a token that this costs instead of the memory", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table(runs: Runs) -> str:
    """Return markdown: loss by position over seeds, differences paired by seed, infini's gates."""
    names = [f"{low}-{high}" for low, high in zip(EDGES[:-2], EDGES[1:-1], strict=True)]
    names.append(f"{EDGES[-2]}-")
    head = " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1)
    text = f"{HEADING}\n| loss, mean over seeds | {head}"
    for memory, seeds in runs.items():
        for kind in ("on", "off", "shuffled"):
            rows = [seeds[seed][kind] for seed in sorted(seeds)]
            text += f"\n| {memory}, {kind} ({len(rows)}) |" + _cells(rows, spread=False)
    text += f"\n\n| difference (95 % interval) | {head}"
    for memory, seeds in runs.items():
        if memory == "none":
            continue
        for label, other, kind in (
            ("none", runs.get("none", {}), "on"),
            ("its own off", seeds, "off"),
            ("its own shuffled", seeds, "shuffled"),
        ):
            rows = _differences(seeds, other, kind)
            text += f"\n| {label} - {memory} ({len(rows)}) |" + _cells(rows, spread=True)
    deepest = runs.get("rmt", {})
    for memory in (name for name in runs if name.startswith("rmt-bptt-")):
        rows = _differences(deepest, runs.get(memory, {}), "on")
        text += f"\n| {memory} - rmt ({len(rows)}) |" + _cells(rows, spread=True)
    text += (
        "\n\n| share of memory (sigmoid of the gate), by layer: least to greatest of all heads |"
    )
    text += " 0 | 1 | 2 | 3 |\n|" + " --- |" * 5
    for memory in ("infini", "infini-one-rate"):
        for seed, row in sorted(runs.get(memory, {}).items()):
            layers = [f" {min(heads):.3f} to {max(heads):.3f} |" for heads in row["gates"]]
            text += f"\n| {memory}, seed {seed} |" + "".join(layers)
    return text


def _differences(
    ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], kind: str
) -> list[list[float]]:
    """Return theirs (read as `kind`) less ours, for each seed that both have."""
    return [
        [b - a for a, b in zip(ours[seed]["on"], theirs[seed][kind], strict=True)]
        for seed in sorted(ours.keys() & theirs.keys())
    ]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and half of its 95 % interval, 0 of one seed."""
    mean, many = statistics.mean(values), len(values) > 1
    spread = STUDENT[len(values)] * statistics.stdev(values) if many else 0.0
    return mean, spread / len(values) ** 0.5


def _cells(rows: list[list[float]], *, spread: bool) -> str:
    """Return a line's cells; with a spread, those whose interval leaves out zero in bold."""
    cells = []
    for values in zip(*rows, strict=True):
        mean, half = _interval(values)
        cell = f"{mean:.3f}"
        if spread and len(values) > 1:
            cell = f"{cell} ± {half:.3f}"
            if abs(mean) > half:
                cell = f"**{cell}**"
        cells.append(f" {cell} |")
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
        if name != "table":
            command.add_argument("folder", type=Path)
        if name != "prepare":
            command.add_argument("--results", type=Path, default=Path("docs/results/learning"))
        if name == "table":
            command.add_argument("--picture", type=Path)
        if name == "run":
            command.add_argument("--memory", choices=SETTINGS, required=True)
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--steps", type=int, default=250)
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
        settle_heap()
        result = train(args.folder, args.memory, args.seed, args.steps, args.lr)
        args.results.mkdir(parents=True, exist_ok=True)
        file = args.results / f"{args.memory}-{args.seed}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    else:
        runs = read_runs(args.results)
        print(table(runs))
        if args.picture is not None:
            plot(runs, args.picture)


if __name__ == "__main__":
    main()
