"""The picture of a run: loss by step, loss by position in the document, the memory's worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from train.evaluation.positions import LABELS, Condition, Evaluation, PositionLosses
from train.evaluation.verdict import difference, judge
from train.tracking.progress import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "summary.png"

Row = Mapping[str, Any]
"""A line of log.jsonl: step, loss, grad_norm, lr, tokens_per_s, mfu, time."""

_ON, _FAINT = "#0b5394", "#8a8a8a"
# Told apart without colour too, and on top of one another: the last drawn is memory on.
_STYLES: dict[Condition, dict[str, Any]] = {
    "off": {"color": "#cc4125", "marker": "s"},
    "shuffled": {"color": "#b45f06", "marker": "^", "linestyle": (0, (5, 2))},
    "beyond": {"color": "#38761d", "marker": "v", "linestyle": (0, (2, 1.5))},
    "on": {"color": _ON, "marker": "o"},
}


def tidy(history: Sequence[Row]) -> list[Row]:
    """Return the rows with a finite loss, one a step, in order of steps.

    A run that went back to a checkpoint wrote some steps twice: the later row counts, and rows
    of steps that it has not reached again are those of the run that was lost.
    """
    kept: list[Row] = []
    for row in history:
        if "loss" not in row or "step" not in row:
            continue
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return [row for row in kept if known(row["loss"])]


def known(value: object) -> bool:
    """Return whether a logged value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def plot(
    run_dir: Path,
    *,
    history: Sequence[Row],
    evaluation: Evaluation | None = None,
    title: str,
) -> Path:
    """Write <run_dir>/summary.png and return its path.

    Left: loss against step. Right, where there was an evaluation: loss by position in the
    document and what the memory saves there. title: the run's name and its layout.
    """
    if evaluation is None:
        figure = _figure(title, width=8.0)
        _plot_training(_axes(figure, figure.add_gridspec()[0]), tidy(history))
        return _save(figure, run_dir / PICTURE)
    figure = _figure(title, width=12.0)
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 3), height_ratios=(5, 2))
    _plot_training(_axes(figure, grid[:, 0]), tidy(history))
    _plot_evaluation(figure, grid, 1, evaluation)
    return _save(figure, run_dir / PICTURE)


def plot_evaluation(path: Path, evaluation: Evaluation, *, title: str) -> Path:
    """Write the picture of one evaluation, loss by position, to path and return it."""
    figure = _figure(title, width=8.0)
    grid = figure.add_gridspec(2, 1, height_ratios=(5, 2))
    _plot_evaluation(figure, grid, 0, evaluation)
    return _save(figure, path)


def _figure(title: str, width: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot: no global state, no window system, no style left behind.
    figure = Figure(figsize=(width, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15, fontweight="bold")
    return figure


def _axes(figure: Figure, place: Any, below: Axes | None = None) -> Axes:
    axes = figure.add_subplot(place, sharex=below)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=12)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


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
        axes.plot(_thin(steps), _thin(losses), color=_ON, linewidth=2)
    axes.set_title(f"training loss: {losses[-1]:.3f} at the end", fontsize=13, loc="left")
    axes.margins(x=0.02)


def _thin(values: Sequence[float]) -> list[float]:
    """Return medians of about a hundred stretches: a spike shows only in the raw line."""
    length = max(2, len(values) // 100)
    return [median(values[i : i + length]) for i in range(0, len(values), length)]


def _plot_evaluation(figure: Figure, grid: Any, column: int, evaluation: Evaluation) -> None:
    if not evaluation.pairs:
        axes = _axes(figure, grid[:, column])
        _plot_positions(axes, evaluation)
        axes.set_xlabel("tokens of the document already read", fontsize=12)
        return
    axes = _axes(figure, grid[0, column])
    _plot_positions(axes, evaluation)
    axes.tick_params(labelbottom=False)
    _plot_differences(_axes(figure, grid[1, column], axes), evaluation)


def _plot_positions(axes: Axes, evaluation: Evaluation) -> None:
    first = evaluation.columns[0]
    axes.set_title("held-out loss", fontsize=13, loc="left")
    axes.set_ylabel("nats per token", fontsize=12)
    centres = _centres(first.edges)
    by_condition = {losses.condition: losses for losses in evaluation.columns}
    for condition, style in _STYLES.items():
        if condition in by_condition:
            means, label = by_condition[condition].means, LABELS[condition]
            axes.plot(centres, means, label=label, linewidth=2, **style)
    _add_perplexity(axes)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xlim(centres[0] / 1.5, first.edges[-1] * 1.05)
    every = 1 + (len(centres) - 1) // 12  # labels that stand apart
    ticks = first.edges[1::every]
    axes.set_xticks(ticks, [_tokens(edge) for edge in ticks])
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.14 * (high - low), high)
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
    _mark_first_segment(axes, first)
    # Beside the title, where no curve can run.
    axes.legend(
        frameon=False,
        fontsize=12 if len(by_condition) < 4 else 10,
        ncols=len(by_condition),
        loc="lower right",
        bbox_to_anchor=(1.0, 0.98),
        borderaxespad=0.0,
        handlelength=1.6 if len(by_condition) < 4 else 1.3,
        columnspacing=1.2 if len(by_condition) < 4 else 0.7,
    )


def _add_perplexity(axes: Axes) -> None:
    """Add a scale of perplexity, exp(loss), on the right: the same curves read twice."""
    right = axes.secondary_yaxis(
        "right",
        functions=(
            lambda x: np.exp(np.clip(x, -700, 700)),
            lambda x: np.log(np.maximum(x, 1e-300)),
        ),
    )
    right.set_ylabel("perplexity", fontsize=12)
    right.spines["right"].set_visible(False)
    right.tick_params(labelsize=12)
    right.yaxis.set_major_formatter(lambda x, _: f"{x:,.4g}")


def _plot_differences(axes: Axes, evaluation: Evaluation) -> None:
    """Draw the differences alone: loss itself varies more between documents than it falls."""
    first = evaluation.columns[0]
    centres = _centres(first.edges)
    axes.axhline(0.0, color=_FAINT, linewidth=1)
    for on, other in evaluation.pairs:
        changes = [theirs - mine for mine, theirs in zip(on.means, other.means, strict=True)]
        style = _STYLES[other.condition]
        axes.plot(centres, changes, linewidth=2, **style)
        found = [difference(on, other, bucket=i) for i in range(len(centres))]
        spans = [
            (d.low, d.high) if d and d.low is not None and d.high is not None else (c, c)
            for d, c in zip(found, changes, strict=True)
        ]
        low, high = zip(*spans, strict=True)
        axes.fill_between(centres, low, high, color=style["color"], alpha=0.15, linewidth=0)
    # As high as the lines need: intervals of short buckets would make them flat.
    ends = [*(value for line in axes.get_lines()[1:] for value in _finite(line.get_ydata())), 0.0]
    room = max(0.5 * (max(ends) - min(ends)), 1e-6)
    axes.set_ylim(min(ends) - room, max(ends) + room)
    axes.set_xlabel("tokens of the document already read", fontsize=12)
    axes.set_ylabel("nats per token", fontsize=12)
    verdict = judge(evaluation)
    text = "difference from memory on, 95 % intervals"
    if verdict is not None:
        text += f" | memory used: {verdict.used}"
    axes.set_title(text, fontsize=13, loc="left")
    axes.axvline(first.segment_len, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))


def _finite(values: Any) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]


def _mark_first_segment(axes: Axes, first: PositionLosses) -> None:
    if first.edges[-1] <= first.segment_len:
        return
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
