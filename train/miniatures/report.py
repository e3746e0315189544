"""The table and the picture of all results, beside the papers' numbers."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.evaluation.confidence import Share, share
from train.miniatures.config import MAX_BLOCKS, Miniature

PLACES = ("start", "middle", "end")
_PANELS = 3  # side by side


def load_results(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the finished seeds of a miniature, by seed."""
    paths = (folder / name).glob("seed-*.json")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(results, key=lambda result: int(result["seed"]))


TITLE = """# The miniatures in numbers

Printed by `longhaul miniature configs/miniatures/*.yaml --table`, from the results of each seed
beside this file; what they say, and what they do not, is in docs/results.md.
"""


def table(folder: Path, miniatures: Iterable[Miniature]) -> str:
    """Return markdown: a summary of all, then each miniature's lengths, places and seeds."""
    found = [(m, load_results(folder, m.name)) for m in miniatures]
    parts = [TITLE, _summary(found)]
    for miniature, results in found:
        if results:
            details = _facts if miniature.facts else _details
            parts.append(details(miniature, results))
    return "\n".join(parts)


def _summary(found: list[tuple[Miniature, list[dict[str, Any]]]]) -> str:
    lines = [
        "| miniature | the paper | here, at the longest length (median of seeds): exact match with"
        " the key at start / middle / end | seeds | trained on | CPU min | parameters |"
        " state bytes | tokens/s | what differs |",
        "|" + " --- |" * 10,
    ]
    for miniature, results in found:
        paper, head = miniature.paper, f"| {miniature.name} | {miniature.paper.result} |"
        if not results:
            lines.append(f"{head} not run | 0 | | | | | | {paper.differs} |")
            continue
        longest = max(cell["tokens"] for cell in results[0]["cells"])
        shares = (_shares(results, longest, place) for place in PLACES)
        medians = " / ".join(_share(_median(share)) for share in shares)
        if miniature.facts:
            medians = _answers(results, longest)
        minutes = statistics.median(result["train_cpu_s"] for result in results) / 60
        speed = statistics.median(result["tokens_per_s"] for result in results)
        lines.append(
            f"{head} {medians} at {longest:,} | {len(results)} |"
            f" {MAX_BLOCKS * miniature.segment_len} tokens | {minutes:.1f} |"
            f" {results[0]['parameters']:,} | {_bytes(results[0]['state_bytes'])} |"
            f" {speed:,.0f} | {paper.differs} |"
        )
    return "\n".join(lines) + "\n"


def _answers(results: list[dict[str, Any]], tokens: int) -> str:
    """Return the summary of multi-fact recall."""
    cells = [c for result in results for c in result["cells"] if c["tokens"] == tokens]
    medians = [
        _share(statistics.median(c[key] / c["prompts"] for c in cells))
        for key in ("exact", "found", "uniform")
    ]
    return "answered {}, gold block found {}; {} answered by uniform search,".format(*medians)


def _facts(miniature: Miniature, results: list[dict[str, Any]]) -> str:
    """Return the table of multi-fact recall: a row for each length, a column for each seed."""
    lines = [
        f"## {miniature.name}",
        "",
        "One fact in every block but the last: answered, of all prompts of all seeds with its 95 %"
        " interval; and of each seed: answered / gold block has the most weight / answered where"
        " the search weighs all blocks alike (mean weight of the gold block).",
        "",
        "| tokens | facts | all seeds |" + "".join(f" seed {r['seed']} |" for r in results),
        "|" + " --- |" * (3 + len(results)),
    ]
    by_seed = [{c["tokens"]: c for c in result["cells"]} for result in results]
    for tokens in sorted({tokens for cells in by_seed for tokens in cells}):
        cells = [found for cells in by_seed if (found := cells.get(tokens))]
        shown = [
            " / ".join(_share(c[key] / c["prompts"]) for key in ("exact", "found", "uniform"))
            + f" ({c['weight']:.2f})"
            for c in cells
        ]
        pooled = share(sum(c["exact"] for c in cells), sum(c["prompts"] for c in cells))
        facts = tokens // miniature.segment_len - 1
        lines.append(
            f"| {tokens:,} | {facts} | {_interval(pooled)} |" + "".join(f" {s} |" for s in shown)
        )
    return "\n".join(lines) + "\n"


def _interval(interval: Share) -> str:
    return f"{interval.value:.3f} ({interval.low:.2f} to {interval.high:.2f})"


def _details(miniature: Miniature, results: list[dict[str, Any]]) -> str:
    """Return one miniature's table: a row for each length and place, a column for each seed."""
    lines = [
        f"## {miniature.name}",
        "",
        "Exact match of four digits, of all prompts of all seeds with its 95 % interval, and of"
        " each seed (digits right in brackets)." + _about_hits(results),
        "",
        "| tokens | key at | all seeds |" + "".join(f" seed {r['seed']} |" for r in results),
        "|" + " --- |" * (3 + len(results)),
    ]
    by_seed = [{(c["tokens"], c["place"]): c for c in result["cells"]} for result in results]
    where = {key for cells in by_seed for key in cells}
    for tokens, place in sorted(where, key=lambda key: (key[0], PLACES.index(key[1]))):
        cells = [cells.get((tokens, place)) for cells in by_seed]
        prompts = sum(cell["prompts"] for cell in cells if cell)
        all_seeds = share(sum(cell["exact"] for cell in cells if cell), prompts)
        lines.append(
            f"| {tokens:,} | {place} | {_interval(all_seeds)} |"
            + "".join(f" {_cell(cell)} |" for cell in cells)
        )
    return "\n".join(lines) + "\n"


def plot(folder: Path, miniatures: Iterable[Miniature], path: Path) -> None:
    """Write a picture: a panel a miniature; exact match by length and key position.

    Lines are medians of the seeds, dots single seeds; miniatures without a result have no panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loaded = [(each, load_results(folder, each.name)) for each in miniatures]
    shown = [(each, results) for each, results in loaded if results]
    if not shown:
        raise ValueError(f"{folder} has no result of {[each.name for each, _ in loaded]} to draw")
    height = math.ceil(len(shown) / _PANELS)
    figure, grid = pyplot.subplots(
        height, _PANELS, figsize=(3.2 * _PANELS, 2.3 * height), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for axes, (each, results) in zip(grid.flat, shown, strict=False):
        cells = [cell for result in results for cell in result["cells"]]
        lengths = sorted({cell["tokens"] for cell in cells})
        for place in dict.fromkeys(cell.get("place") for cell in cells):
            shares = [_shares(results, tokens, place) for tokens in lengths]
            (line,) = axes.plot(
                lengths, [_median(x) for x in shares], lw=1.2, label=place or "answered"
            )
            for tokens, seeds in zip(lengths, shares, strict=True):
                axes.plot([tokens] * len(seeds), seeds, ".", ms=4, color=line.get_color())
        axes.axvline(MAX_BLOCKS * each.segment_len, color="0.7", lw=1, ls=":")
        seeds_shown = f"{len(results)} seed{'s' if len(results) > 1 else ''}"
        axes.set_title(f"{each.name} ({seeds_shown})", fontsize=9)
        axes.legend(frameon=False, fontsize=7, loc="lower left")
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    grid[0, 0].set(xscale="log", ylim=(-0.03, 1.03))
    figure.supxlabel("tokens (dotted: the longest trained)", fontsize=9)
    figure.supylabel("exact match", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _about_hits(results: list[dict[str, Any]]) -> str:
    """Return what the hit rate is, where there is one."""
    if not any(cell.get("found") is not None for result in results for cell in result["cells"]):
        return ""
    return (
        " hit: share of the tokens that read a digit for which a head retrieved the key's block;"
        " behind it the mean share of heads that did."
    )


def _shares(results: list[dict[str, Any]], tokens: int, place: str | None) -> list[float]:
    return [
        cell["exact"] / cell["prompts"]
        for result in results
        for cell in result["cells"]
        if cell["tokens"] == tokens and cell.get("place") == place
    ]


def _median(shares: list[float]) -> float:
    return statistics.median(shares) if shares else math.nan


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    prompts, hit = cell["prompts"], ""
    if cell.get("found") is not None:
        hit = f", hit {cell['found'] / prompts / 4:.2f} / {cell['found_by_heads']:.2f}"
    return f"{cell['exact'] / prompts:.2f} ({cell['digits'] / prompts / 4:.2f}){hit}"


def _bytes(sizes: dict[str, int]) -> str:
    """Return a stream's state: one number where it is constant, else shortest to longest."""
    values = [sizes[key] for key in sorted(sizes, key=int)]
    if not values:
        return "-"
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}"
