"""One HTML page of an evaluation: nothing to fetch, nothing to install, to be sent as it is."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from train.evaluation.positions import LABELS, Evaluation, bucket_name, perplexity
from train.evaluation.rates import Place, cell_tables
from train.evaluation.verdict import NAMES, NEGLIGIBLE, Difference, Verdict, difference, judge

REPORT = "report.html"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
  max-width: 64rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
caption { text-align: left; color: #666; padding-bottom: 0.3rem; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 600; } th:first-child, .facts td { text-align: left; }
tr.all td, tr.all th { border-top: 2px solid #999; }
.scroll { overflow-x: auto; } img { max-width: 100%; }
.verdict { border-left: 0.5rem solid; padding: 0.6rem 1rem; background: #f6f6f6; }
.verdict p { margin: 0.2rem 0; } .verdict strong { font-size: 1.2rem; }
.yes { border-color: #38761d; } .no { border-color: #cc4125; } .unclear { border-color: #b45f06; }
.small { color: #666; font-size: 0.85rem; }
"""


class TaskResult(Protocol):
    """What one task found; train.evaluation.questions.TaskResult is one."""

    @property
    def task(self) -> str:
        """Its name."""
        ...

    @property
    def cells(self) -> Sequence[Place]:
        """The shares of right answers."""
        ...

    @property
    def verdict(self) -> str:
        """Whether the memory is used: yes, no or unclear."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        ...


class Answers(NamedTuple):
    """A task's result, and its verdict in a sentence."""

    result: TaskResult
    words: str


class Report(NamedTuple):
    """What a page shows."""

    title: str
    facts: Sequence[tuple[str, str]]  # name, value: the checkpoint, its data, its costs
    evaluation: Evaluation
    picture: bytes | None = None  # PNG
    tasks: Sequence[Answers] = ()
    notes: Sequence[str] = ()  # what a reader must know, such as documents left out


def write_report(path: Path, report: Report) -> Path:
    """Write the page to path and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8")
    return path


def render(report: Report) -> str:
    """Return the page's HTML; every text in it is escaped."""
    verdict = judge(report.evaluation)
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        _verdict(verdict) if verdict else "<p>This model has no memory to judge.</p>",
        *(f"<p><strong>{escape(note)}</strong></p>" for note in report.notes),
        "<h2>What was measured</h2>",
        html_table([], report.facts, kind="facts"),
        "<h2>Loss and perplexity by position in the document</h2>",
        _positions(report.evaluation),
        _image(report.picture, "loss and perplexity by position, and their differences"),
        _explanation(verdict),
    ]
    for task in report.tasks:
        parts.append(f"<h2>Task: {escape(task.result.task)}</h2>")
        parts.append(_box(task.result.verdict, [task.words]))
        tables = cell_tables(task.result.cells)
        parts += [html_table(table.heads, table.rows, table.caption) for table in tables]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def html_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    *,
    kind: str = "",
    last_is_sum: bool = False,
) -> str:
    """Return a table of texts; the first cell of each row heads it."""
    rows = list(rows)
    lines = [f'<div class="scroll"><table class="{kind}">']
    if caption:
        lines.append(f"<caption>{escape(caption)}</caption>")
    if heads:
        cells = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
        lines.append(f"<thead><tr>{cells}</tr></thead>")
    lines.append("<tbody>")
    for number, row in enumerate(rows, 1):
        style = ' class="all"' if last_is_sum and number == len(rows) else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        lines.append(f'<tr{style}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _verdict(verdict: Verdict) -> str:
    differences = [f"{name}: {text}" for name, text in verdict.lines()]
    return _box(verdict.used, [verdict.reason, *differences])


def _box(used: str, lines: Sequence[str]) -> str:
    """Return a verdict, in a word and a colour, and the lines that explain it."""
    style = used if used in ("yes", "no") else "unclear"
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return (
        f'<div class="verdict {style}"><p><strong>memory used: {escape(used)}</strong></p>'
        f"{text}</div>"
    )


def _positions(evaluation: Evaluation) -> str:
    columns, pairs = evaluation.columns, evaluation.pairs
    heads = ["position", "tokens", *(LABELS[column.condition] for column in columns)]
    heads += [f"perplexity, {LABELS[column.condition]}" for column in columns]
    heads += [f"{NAMES[other.condition]} − on" for _, other in pairs]
    rows = []
    for i, count in enumerate(columns[0].counts):
        means = [column.means[i] for column in columns]
        changes = [_change(difference(on, other, bucket=i)) for on, other in pairs]
        rows.append([bucket_name(columns[0].edges, i), f"{count:,}", *_both(means), *changes])
    means = [column.loss for column in columns]
    ends = [f"{other.loss - on.loss:+.4f}" for on, other in pairs]
    rows.append(["all", f"{columns[0].tokens:,}", *_both(means), *ends])
    caption = "loss in nats a token; position: tokens of the document already read"
    return html_table(heads, rows, caption, last_is_sum=True)


def _both(means: Sequence[float]) -> list[str]:
    """Return losses and then their perplexities."""
    losses = [f"{mean:.4f}" if math.isfinite(mean) else "–" for mean in means]
    return losses + [f"{perplexity(mean):,.4g}" if math.isfinite(mean) else "–" for mean in means]


def _change(found: Difference | None) -> str:
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{found.mean:+.4f}"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _image(png: bytes | None, text: str) -> str:
    if png is None:
        return ""
    data = base64.b64encode(png).decode()
    return f'<p><img alt="{escape(text)}" src="data:image/png;base64,{data}"></p>'


def _explanation(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    return (
        '<p class="small">All conditions read the same tokens. <em>off</em>: nothing is carried'
        " from segment to segment. <em>shuffled</em>: each segment is read with the memory of a"
        " stream in another document. <em>own window</em>: the same, but the window&rsquo;s keys"
        " stay the stream&rsquo;s own, so that only what lies beyond the window is exchanged."
        " Intervals are 95 %, over passages (documents, or the part that one stream read), by"
        " Student&rsquo;s t. <em>yes</em>: the interval of the last of these that was measured,"
        " less memory on, lies above 0. <em>no</em>: it does not, and ends below"
        f" {NEGLIGIBLE:g} nats a token. <em>unclear</em>: neither.</p>"
    )
