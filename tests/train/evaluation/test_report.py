"""The page of an evaluation: whole in itself, and it says what was measured."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from tests.train.evaluation.test_verdict import compared
from train.evaluation.positions import Evaluation
from train.evaluation.rates import aligned, cell_tables, rate_text
from train.evaluation.report import Answers, Report, render, write_report

PNG = b"\x89PNG not really"


class Share(NamedTuple):
    value: float
    low: float
    high: float


class Cell(NamedTuple):
    length: int
    depth: float | None
    pairs: int | None
    n: int
    on: Share
    off: Share
    shuffled: Share


class Result(NamedTuple):
    task: str
    cells: tuple[Cell, ...]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        return {"task": self.task}


def cell(length: int, depth: float | None = None, pairs: int | None = None) -> Cell:
    on, none = Share(0.97, 0.84, 0.99), Share(0.0, 0.0, 0.1)
    return Cell(length, depth, pairs, 32, on, none, none)


def page(**more: Any) -> str:
    settings: dict[str, Any] = {
        "title": "run <b>",
        "facts": [("parameters", "1,000 & more")],
        "evaluation": compared([0.1, 0.12, 0.09, 0.11]),
    }
    return render(Report(**(settings | more)))


class Tags(HTMLParser):
    """Checks that what is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_fetches_nothing_and_closes_what_it_opens() -> None:
    answers = Answers(Result("passkey", (cell(512, 0.5),), "no"), "not used")
    text = page(picture=PNG, tasks=[answers], notes=["left out: <x>"])
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert [source[:22] for source in tags.sources] == ["data:image/png;base64,"]
    assert "http" not in text and "<script" not in text and "@import" not in text


def test_texts_are_escaped() -> None:
    text = page(notes=["<script>"])
    assert "run &lt;b&gt;" in text and "1,000 &amp; more" in text
    assert "<script>" not in text


def test_the_verdict_is_said_in_words_with_its_differences() -> None:
    text = page()
    assert "<strong>memory used: yes</strong>" in text
    assert "shuffled - on: +0.1050 (95 % interval" in text
    assert "<strong>memory used: no</strong>" in page(evaluation=compared([0.0] * 4))


def test_positions_have_loss_perplexity_and_differences_with_intervals() -> None:
    row = re.search(r'<th scope="row">4 - 7</th>(.*?)</tr>', page(), re.S)
    assert row is not None
    cells = re.findall(r"<td>(.*?)</td>", row.group(1))
    assert cells[:7] == ["400", "2.0000", "2.1050", "2.1050", "7.389", "8.207", "8.207"]
    assert re.fullmatch(r"\+0\.1050 \[\+0\.0\d+, \+0\.1\d+\]", cells[7])


def test_one_condition_makes_a_page_too() -> None:
    on = compared([0.1, 0.1]).on
    text = page(evaluation=Evaluation(on=on))
    assert "no memory to judge" in text and "memory off" not in text


def test_a_task_is_a_grid_and_all_its_shares() -> None:
    cells = [cell(length, depth) for length in (512, 1024) for depth in (0.0, 1.0)]
    grid, full = cell_tables(cells)
    assert grid.heads == ["length", "depth 0", "depth 1"]
    assert grid.rows == [["512 tokens", "0.97", "0.97"], ["1,024 tokens", "0.97", "0.97"]]
    assert full.heads == ["length", "depth", "prompts", "on", "off", "shuffled"]
    first = ["512 tokens", "0", "32", "0.97 [0.84, 0.99]", "0.00 [0.00, 0.10]"]
    assert list(full.rows[0])[:5] == first
    recall = cell_tables([cell(512, pairs=4), cell(512, pairs=16)])[-1]
    assert [row[1] for row in recall.rows] == ["4", "16"]
    assert cell_tables([cell(512)])[0].heads[:2] == ["length", "prompts"]


def test_no_trials_are_no_share() -> None:
    assert rate_text(Share(math.nan, 0.0, 1.0)) == "–"


def test_columns_are_aligned() -> None:
    assert aligned([["a", "bb"], ["ccc", "d"]]) == "  a  bb\nccc   d"


def test_a_page_is_written_where_it_is_wanted(tmp_path: Path) -> None:
    path = write_report(
        tmp_path / "new" / "r.html", Report("x", [("a", "b")], compared([0.1, 0.1]))
    )
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
