"""The end of a run: what it reached, in a screen of text. train.tracking.picture draws it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from train.evaluation.positions import LABELS, Evaluation, table
from train.evaluation.report import REPORT
from train.evaluation.verdict import judge
from train.tracking.picture import PICTURE, Row, known, plot, tidy
from train.tracking.progress import percent, short

__all__ = ["plot", "summarise"]


def summarise(
    run_dir: Path,
    *,
    history: Sequence[Row],
    evaluation: Evaluation | None = None,
    formula: str,
    peak_source: str,
    checkpoint: Path | None,
    tracking: str,
    continue_command: str,
) -> str:
    """Return the last lines a run prints.

    history: the rows of the log, in the order written. evaluation: held-out losses, with the
    verdict on the memory. formula, peak_source: the names that belong to the MFU. tracking: where
    the metrics are. continue_command: what goes on from here, or evaluates further.
    """
    rows = tidy(history)
    lines: list[tuple[str, str]] = []
    if rows:
        first, last = rows[0], rows[-1]
        text = f"{last['loss']:.4f} at step {last['step']:,}"
        if first is not last:
            text += f" (step {first['step']:,}: {first['loss']:.4f})"
        lines.append(("training loss", text))
    for losses in evaluation.columns if evaluation else []:
        text = f"{losses.loss:.4f}, perplexity {losses.perplexity:.2f}"
        name = f"held-out, {LABELS[losses.condition]}"
        lines.append((name, f"{text}, {losses.tokens:,} tokens"))
    verdict = judge(evaluation) if evaluation else None
    if verdict is not None:
        lines += [*verdict.lines(), ("memory used", f"{verdict.used}: {verdict.reason}")]
    lines += _speed(rows, formula, peak_source)
    report = run_dir / REPORT
    places = [("checkpoint", checkpoint), ("picture", run_dir / PICTURE), ("report", report)]
    lines += [(name, str(path)) for name, path in places if path is not None and path.exists()]
    lines += [("tracking", tracking), ("continue", continue_command)]
    width = max(len(name) for name, _ in lines)
    blocks = ["\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)]
    if evaluation is not None:
        blocks.insert(0, f"loss by position in the document\n{table(evaluation)}")
    return "\n\n".join(blocks)


def _speed(rows: Sequence[Row], formula: str, peak_source: str) -> list[tuple[str, str]]:
    """Return throughput lines: the median of the second half of the run, which is warm."""
    lines = []
    warm = rows[len(rows) // 2 :]
    rates = [row["tokens_per_s"] for row in warm if known(row.get("tokens_per_s"))]
    if rates:
        lines.append(("throughput", f"{short(median(rates))} tokens/s"))
    shares = [row["mfu"] for row in warm if known(row.get("mfu"))]
    if shares:
        text = f"{percent(median(shares))} ({formula}; peak: {peak_source})"
        lines.append(("MFU", text))
    return lines
