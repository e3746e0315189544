"""Writes docs/plan/: the planner beside published figures, and runs that nobody has made yet.

Run from the repository root: python benchmarks/plan.py [--measured FILE]
All of it is arithmetic of train.planning; --measured adds the table that benchmarks/plan_cpu.py
printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from train.planning import Plan, load_cluster, plan
from train.planning.choose import Choice, choose
from train.settings.config import Config, validate

OUTPUT = Path("docs/plan")

MODELS: dict[str, dict[str, Any]] = {
    "1B": dict(num_layers=16, hidden_size=2048, num_heads=16, num_kv_heads=8, ffn_size=8192),
    "7B": dict(num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=32, ffn_size=11008),
    "8B": dict(num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, ffn_size=14336),
    "Qwen3-8B": dict(num_layers=36, hidden_size=4096, num_heads=32, num_kv_heads=8, ffn_size=12288),
    "70B": dict(num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8, ffn_size=28672),
}
VOCAB = {"7B": 32_000, "Qwen3-8B": 151_936}


def config_of(
    name: str, length: int, lanes: int, world: int | None, **changes: dict[str, Any]
) -> Config:
    """Return a run whose samples are `length` tokens; without a memory, one segment each."""
    values: dict[str, Any] = {
        "name": "plan",
        "model": MODELS[name] | {"vocab_size": VOCAB.get(name, 128_256)},
        "data": {"train": "shards", "segment_len": length, "sample_len": length},
        "train": {"steps": 1000, "batch_size": lanes, "lr": 1e-4, "precision": "bf16"},
        "parallel": {},
    }
    for section, given in changes.items():
        values[section] = values[section] | given
    return validate(values, world_size=world)


class Published(NamedTuple):
    """A figure of facts others published, normalised to tokens a second and GPU."""

    source: str
    model: str
    length: int
    gpus: int
    cluster: str
    tokens_per_s: float
    layout: dict[str, Any]
    train: dict[str, Any]
    note: str


K = 1024
PUBLISHED = (
    Published("torchtitan 2024-12, FSDP, compile", "8B", 8 * K, 8, "h100", 6667,
              {"zero": 3}, {"checkpointing": "selective"}, "500 W parts, HBM2e"),
    Published("torchtitan, FSDP", "8B", 8 * K, 64, "a100", 2973,
              {"zero": 3}, {"checkpointing": "selective"}, ""),
    Published("ALST, baseline", "8B", 32 * K, 8, "h100", 1928,
              {"zero": 3}, {"checkpointing": "block"}, "eager, optimizer offloaded to the host"),
    Published("Untied Ulysses", "8B", 128 * K, 8, "h100", 2280,
              {"zero": 3, "cp": 8}, {"checkpointing": "block"}, "second-hand figure"),
    Published("ALST, Ulysses 8", "8B", 1024 * K, 8, "h100", 244,
              {"zero": 3, "cp": 8}, {"checkpointing": "block"}, "1.1M tokens; inputs offloaded"),
    Published("TRL 1.13, CP 8", "Qwen3-8B", 1024 * K, 8, "h100", 345,
              {"zero": 3, "cp": 8}, {"checkpointing": "block"}, "56.2 GB a GPU"),
    Published("EasyContext, ring", "7B", 64 * K, 8, "a100", 977,
              {"zero": 3, "cp": 8}, {"checkpointing": "block"}, "optimizer offloaded to the host"),
    Published("EasyContext, ring", "7B", 512 * K, 8, "a100", 267,
              {"zero": 3, "cp": 8}, {"checkpointing": "block"}, "optimizer offloaded to the host"),
)  # fmt: skip


def published() -> str:
    """Return the table of published figures beside predictions."""
    rows = [
        "| source | model, tokens | GPUs | published tok/s/GPU | planned | error | planned memory |"
        " note |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    ]
    for p in PUBLISHED:
        lanes = p.gpus // p.layout.get("cp", 1)
        train = {"batch_size": lanes, "loss_chunk": "4k", "ffn_chunk": "8k"} | p.train
        config = config_of(p.model, p.length, lanes, p.gpus, parallel=p.layout, train=train)
        made = plan(config, load_cluster(p.cluster), -(-p.gpus // 8), min(8, p.gpus))
        speed = made.tokens_per_step / made.time.total / p.gpus
        rows.append(
            f"| {p.source} | {p.model} {p.length // K}k | {p.gpus} {p.cluster} |"
            f" {p.tokens_per_s:,.0f} | {speed:,.0f} | {speed / p.tokens_per_s - 1:+.0%} |"
            f" {made.memory.total / 2**30:.1f} GiB | {p.note} |"
        )
    return "\n".join(rows) + "\n"


LENGTHS = {"32k": 32 * K, "128k": 128 * K, "1M": K * K, "10M": 10 * K * K}
SIZES = (64, 256, 1024, 4096, 16384)
MEMORIES: dict[str, dict[str, Any]] = {
    "full attention": {"name": "none"},
    "fam": {"name": "fam", "window": 1},
    "infini": {"name": "infini", "window": 1},
    "rmt": {"name": "rmt", "window": 1},
    "armt": {"name": "armt", "window": 1},
    "hmt": {"name": "hmt", "bank": 640},
    "landmark": {"name": "landmark", "window": 1, "retrieve": 2},
    "window": {"name": "window"},
}
STEP = 16 * K * K
ONLY: dict[str, Any] = {
    "parallel.tp": (1, 8),
    "parallel.attention": ("ring",),
    "parallel.zero": (1, 3),
    "train.checkpointing": ("selective", "block"),
    "train.micro_batch": (1,),
}


def best(model: str, length: int, gpus: int, memory: str) -> Choice | None:
    """Return the fastest layout of a 16M-token step; None where none fits or divides."""
    data = {"sample_len": length, "segment_len": length}
    if memory != "full attention":
        data["segment_len"] = 16 * K
    config = config_of(
        model,
        length,
        max(1, STEP // length),
        None,
        data=data | {"train": "shards"},
        model={"memory": MEMORIES[memory]},
        train={
            "loss_chunk": "4k",
            "ffn_chunk": "8k",
            "bptt_len": min(length, 128 * K) if memory != "full attention" else length,
        },
    )
    found = choose(config, load_cluster("h100"), gpus // 8, 8, only=ONLY)
    return found.ranked[0] if found.ranked else None


def limit_of(made: Plan) -> str:
    """Return what takes most of a step beside arithmetic."""
    time = made.time
    parts = {
        "CP": time.context_parallel,
        "TP": time.tensor_parallel,
        "ZeRO": time.zero,
        "chain": time.chain,
        "launches": time.waiting,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{name} {parts[name] / time.total:.0%}" if parts[name] / time.total >= 0.1 else ""


def scale() -> tuple[str, list[dict[str, Any]]]:
    """Return the tables, and what they show."""
    rows, text = [], ""
    for model in ("1B", "8B", "70B"):
        for name, length in LENGTHS.items():
            header = " | ".join(f"{gpus} GPUs" for gpus in SIZES)
            text += f"\n### {model}, {name} tokens\n\n| memory | {header} |\n| --- |"
            text += " --- |" * len(SIZES) + "\n"
            for memory in MEMORIES:
                cells = []
                for gpus in SIZES:
                    choice = best(model, length, gpus, memory)
                    cells.append(cell(choice))
                    if choice is not None:
                        rows.append(
                            {"model": model, "length": length, "memory": memory, "gpus": gpus}
                            | {"tokens_per_day": choice.plan.tokens_per_day, "mfu": choice.plan.mfu}
                            | {"network": network_share(choice.plan)}
                        )
                text += f"| {memory} | {' | '.join(cells)} |\n"
                print(model, name, memory, cells, file=sys.stderr)
    return text, rows


def network_share(made: Plan) -> float:
    """Return the share of a step that waits for messages."""
    time = made.time
    return (time.context_parallel + time.tensor_parallel + time.zero) / time.total


def against_full_attention(rows: list[dict[str, Any]]) -> str:
    """Return the table of tokens a day against full attention's, each at its best layout."""
    return _summary(
        rows,
        "Tokens a day against full attention's on as many GPUs: 64 / 1024 / 16384.",
        lambda row, full: f"{row['tokens_per_day'] / full['tokens_per_day']:.2g}" if full else "?",
        (64, 1024, 16384),
    )


def network_limits(rows: list[dict[str, Any]]) -> str:
    """Return the table of what share of a step waits for messages."""
    return _summary(
        rows,
        "Share of a step that waits for messages (CP, TP and ZeRO): 64 / 1024 / 16384 GPUs.",
        lambda row, full: f"{row['network']:.0%}",
        (64, 1024, 16384),
    )


def _summary(
    rows: list[dict[str, Any]],
    title: str,
    show: Callable[[dict[str, Any], dict[str, Any] | None], str],
    sizes: tuple[int, ...],
) -> str:
    known = {(r["model"], r["length"], r["memory"], r["gpus"]): r for r in rows}
    columns = [(model, name) for model in ("1B", "8B", "70B") for name in LENGTHS]
    text = f"\n### {title[:-1]}\n\n| memory | " + " | ".join(" ".join(c) for c in columns)
    text += " |\n|" + " --- |" * (len(columns) + 1) + "\n"
    for memory in MEMORIES:
        cells = []
        for model, name in columns:
            places = [(model, LENGTHS[name], memory, size) for size in sizes]
            shown = [
                show(known[place], known.get((*place[:2], "full attention", place[3])))
                if place in known
                else "-"
                for place in places
            ]
            cells.append(" / ".join(shown))
        text += f"| {memory} | {' | '.join(cells)} |\n"
    return text


def cell(choice: Choice | None) -> str:
    """Return a run in a table."""
    if choice is None:
        return "-"
    made, shapes = choice.plan, choice.plan.shapes
    limit = limit_of(made)
    return (
        f"{made.tokens_per_day / 1e9:,.3g}G, {made.mfu:.0%}, TP{shapes.tp} CP{shapes.cp}"
        f" Z{choice.changes['parallel.zero']}" + (f", {limit}" if limit else "")
    )


def picture(rows: list[dict[str, Any]]) -> None:
    """Plot tokens a day by GPUs."""
    models = ("1B", "8B", "70B")
    figure, axes = plt.subplots(
        len(models), len(LENGTHS), figsize=(14, 9), sharex=True, constrained_layout=True
    )
    for line, model in zip(axes, models, strict=True):
        for axis, (name, length) in zip(line, LENGTHS.items(), strict=True):
            for memory in MEMORIES:
                points = [
                    (row["gpus"], row["tokens_per_day"])
                    for row in rows
                    if (row["model"], row["length"], row["memory"]) == (model, length, memory)
                ]
                axis.plot(*zip(*points, strict=True) if points else ((), ()), "o-", label=memory)
            axis.set(title=f"{model}, {name} tokens", xscale="log", yscale="log")
    axes[0][0].legend()
    figure.supxlabel("H100 GPUs")
    figure.supylabel("planned tokens a day, 16M tokens a step")
    figure.savefig(OUTPUT / "scale.png", dpi=80)


def main() -> None:
    """Write the pages."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "published.md").write_text(published())
    text, rows = scale()
    head = (
        "# Scale on paper\n\nGenerated by `python benchmarks/plan.py`; none of these runs was made."
        " A step is 16M tokens on H100s; memories read 16k-token segments with one segment's window"
        " and gradients reach 128k tokens back. A cell: tokens a day, MFU, the fastest layout that"
        " fits, and what takes 10% of a step or more beside arithmetic. `-`: no layout fits, or the"
        " step has too few samples to be split over so many ranks.\n\n![tokens a day](scale.png)\n"
    )
    summaries = against_full_attention(rows) + network_limits(rows)
    (OUTPUT / "scale.md").write_text(head + summaries + text)
    (OUTPUT / "scale.json").write_text(json.dumps(rows, indent=1) + "\n")
    picture(rows)


if __name__ == "__main__":
    main()
