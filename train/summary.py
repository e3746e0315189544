"""The end of a run: what it reached, in a screen of text and one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from train.positions import PositionLosses, describe_gain, gain, table
from train.progress import percent, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "summary.png"

Row = Mapping[str, Any]
"""A line of log.jsonl: step, loss, grad_norm, lr, tokens_per_s, mfu, time."""

_ON, _OFF, _FAINT = "#0b5394", "#cc4125", "#8a8a8a"


def summarise(
    run_dir: Path,
    *,
    history: Sequence[Row],
    on: PositionLosses | None = None,
    off: PositionLosses | None = None,
    formula: str,
    peak_source: str,
    checkpoint: Path | None,
    tracking: str,
    continue_command: str,
) -> str:
    """Return the last lines a run prints.

    history: the rows of the log, in the order written. on, off: held-out losses with the memory
    and without. formula, peak_source: the names that belong to the MFU. tracking: where the
    metrics are. continue_command: what goes on from here, or evaluates further.
    """
    rows = tidy(history)
    lines: list[tuple[str, str]] = []
    if rows:
        first, last = rows[0], rows[-1]
        text = f"{last['loss']:.4f} at step {last['step']:,}"
        if first is not last:
            text += f" (step {first['step']:,}: {first['loss']:.4f})"
        lines.append(("training loss", text))
    for losses in (on, off):
        if losses is not None:
            name = f"held-out, memory {'on' if losses.memory else 'off'}"
            text = f"{losses.loss:.4f}, perplexity {losses.perplexity:.2f}"
            lines.append((name, f"{text}, {losses.tokens:,} tokens"))
    if on is not None and off is not None:
        lines.append(("memory's gain", describe_gain(on, off)))
    lines += _speed(rows, formula, peak_source)
    places = [("checkpoint", checkpoint), ("picture", run_dir / PICTURE)]
    lines += [(name, str(path)) for name, path in places if path is not None and path.exists()]
    lines += [("tracking", tracking), ("continue", continue_command)]
    width = max(len(name) for name, _ in lines)
    blocks = ["\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)]
    if on is not None or off is not None:
        blocks.insert(0, f"loss by position in the document\n{table(on, off)}")
    return "\n\n".join(blocks)


def _speed(rows: Sequence[Row], formula: str, peak_source: str) -> list[tuple[str, str]]:
    """Return throughput lines: the median of the second half of the run, which is warm."""
    lines = []
    warm = rows[len(rows) // 2 :]
    rates = [row["tokens_per_s"] for row in warm if _known(row.get("tokens_per_s"))]
    if rates:
        lines.append(("throughput", f"{short(median(rates))} tokens/s"))
    shares = [row["mfu"] for row in warm if _known(row.get("mfu"))]
    if shares:
        text = f"{percent(median(shares))} ({formula}; peak: {peak_source})"
        lines.append(("MFU", text))
    return lines


def tidy(history: Sequence[Row]) -> list[Row]:
    """Return the rows with a finite loss, one a step, in order of steps.

    A run that went back to a checkpoint wrote some steps twice: the later row counts, and rows
    of steps that it has not reached again are those of the run that was lost.
    """
    kept: dict[int, Row] = {}
    for row in history:
        if "loss" not in row or "step" not in row:
            continue
        for step in [step for step in kept if step >= row["step"]]:
            del kept[step]
        kept[row["step"]] = row
    return [row for row in kept.values() if _known(row["loss"])]


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def plot(
    run_dir: Path,
    *,
    history: Sequence[Row],
    on: PositionLosses | None = None,
    off: PositionLosses | None = None,
    title: str,
) -> Path:
    """Write <run_dir>/summary.png and return its path.

    Left: loss against step. Right, where there was an evaluation: loss by position in the
    document. title: the run's name and its layout.
    """
    evaluated = on is not None or off is not None
    figure, axes = _figure(title, (2, 3) if evaluated else (1,))
    _plot_training(axes[0], tidy(history))
    if evaluated:
        _plot_positions(axes[1], on, off)
    return _save(figure, run_dir / PICTURE)


def plot_evaluation(
    path: Path, on: PositionLosses | None, off: PositionLosses | None, *, title: str
) -> Path:
    """Write the picture of one evaluation, loss by position, to path and return it."""
    figure, axes = _figure(title, (1,))
    _plot_positions(axes[0], on, off)
    return _save(figure, path)


def _figure(title: str, widths: tuple[int, ...]) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot: no global state, no window system, no style left behind.
    figure = Figure(figsize=(12.0 if len(widths) > 1 else 8.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15, fontweight="bold")
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=12)
        one.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        one.set_axisbelow(True)
    return figure, list(axes)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _plot_training(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("training loss", fontsize=13, loc="left")
    axes.set_xlabel("step", fontsize=12)
    axes.set_ylabel("loss (nats per token)", fontsize=12)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    if not rows:
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center")
        return
    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    if len(rows) < 40:
        axes.plot(steps, losses, color=_ON, linewidth=2)
    else:
        axes.plot(steps, losses, color=_ON, linewidth=0.8, alpha=0.3)
        axes.plot(steps, _smooth(losses), color=_ON, linewidth=2)
    axes.set_title(f"training loss: {losses[-1]:.3f} at the end", fontsize=13, loc="left")
    axes.margins(x=0.02)


def _smooth(values: Sequence[float]) -> list[float]:
    """Return running medians over a fortieth of the run: a spike shows only in the raw line."""
    reach = max(1, len(values) // 80)
    return [median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _plot_positions(axes: Axes, on: PositionLosses | None, off: PositionLosses | None) -> None:
    first = on or off
    assert first is not None
    axes.set_title("held-out loss by position in the document", fontsize=13, loc="left")
    axes.set_xlabel("tokens of the document already read", fontsize=12)
    axes.set_ylabel("loss (nats per token)", fontsize=12)
    centres = _centres(first.edges)
    for losses, color, marker in ((off, _OFF, "s"), (on, _ON, "o")):
        if losses is not None:
            label = f"memory {'on' if losses.memory else 'off'}"
            axes.plot(
                centres, losses.means, color=color, marker=marker, label=label, linewidth=2
            )
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xlim(centres[0] / 1.5, first.edges[-1] * 1.05)
    every = 1 + (len(centres) - 1) // 12  # labels that stand apart
    ticks = first.edges[1::every]
    axes.set_xticks(ticks, [_tokens(edge) for edge in ticks])
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.12 * (high - low), high)
    for i in range(0, len(centres), every):
        count = short(first.counts[i])
        axes.annotate(
            f"n = {count}" if i == 0 else count,
            (centres[i], 0.025),
            xycoords=("data", "axes fraction"),
            ha="center",
            fontsize=10,
            color=_FAINT,
        )
    if first.edges[-1] > first.segment_len:
        _mark_first_segment(axes, first, on, off)
    axes.legend(frameon=False, fontsize=12)


def _mark_first_segment(
    axes: Axes, first: PositionLosses, on: PositionLosses | None, off: PositionLosses | None
) -> None:
    axes.axvline(first.segment_len, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "first segment ends",
        (first.segment_len, 1.0),
        (5, -12),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=11,
        color=_FAINT,
    )
    found = gain(on, off) if on is not None and off is not None else None
    if found is None:
        return
    assert on is not None and off is not None
    later = [i for i, edge in enumerate(first.edges[:-1]) if edge >= first.segment_len]
    axes.fill_between(
        [_centres(first.edges)[i] for i in later],
        [on.means[i] for i in later],
        [off.means[i] for i in later],
        color=_ON,
        alpha=0.12,
        linewidth=0,
    )
    error = f" ± {found.error:.3f}" if found.error is not None else ""
    effect = "saves" if found.mean >= 0 else "costs"
    axes.set_title(
        "held-out loss by position in the document: beyond the first\n"
        f"segment the memory {effect} {abs(found.mean):.3f}{error} nats per token",
        fontsize=13,
        loc="left",
    )


def _centres(edges: Sequence[int]) -> list[float]:
    """Return where on a logarithmic axis a bucket's point stands; the first begins at 0."""
    return [edges[1] / math.sqrt(2)] + [
        math.sqrt(low * high) for low, high in zip(edges[1:], edges[2:], strict=False)
    ]


def _tokens(count: int) -> str:
    """Return a number of tokens as configurations write it: 512, 16k, 1M."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if count >= size and count % (size // 4) == 0:
            return f"{count / size:g}{unit}"
    return f"{count:,}"
