"""The tables of docs/check.md: `python -m tests.train.check_tables docs/check.md` writes them."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.train.mutations import MUTATIONS, find
from train.checking.check import check
from train.checking.compare import FLOORS
from train.checking.report import first_off, name_switches, parameter_off
from train.settings.config import load


def mutation_table() -> str:
    """Run every mutation and return what the check says of it, as a markdown table."""
    lines = [
        "| planted | what is off first | error | parameter furthest off | what breaks it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for mutation in MUTATIONS.values():
        report = find(mutation)
        first, parameter, named = first_off(report), parameter_off(report), report.switches
        assert first is not None and named, mutation.about
        cells = [mutation.about, first.describe(), f"{first.error:.1e}"]
        cells += [parameter.name if parameter else "", name_switches(named)]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def shipped_table() -> str:
    """Check every shipped configuration and return its errors, as a markdown table."""
    lines = [
        "| configuration | checked as | loss | norm | gradients | weights |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(Path("configs").glob("*.yaml")):
        report = check(load(path), 4, lambda line: None)
        assert report.passes, path
        for comparison in report.comparisons:
            some = comparison.differences
            errors = [max(e.error for e in some if e.kind == kind) for kind in FLOORS]
            numbers = " | ".join(f"{error:.1e}" for error in errors)
            lines.append(f"| {path.stem} | {comparison.subject.describe()} | {numbers} |")
            print(lines[-1], f"{report.seconds:.0f} s", flush=True)
    return "\n".join(lines)


def put(page: str, name: str, text: str) -> str:
    """Return the page with text between the marks of that name."""
    begin, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, _, rest = page.partition(begin)
    return before + begin + text + "\n" + end + rest.partition(end)[2]


if __name__ == "__main__":
    page = Path(sys.argv[1])
    text = put(page.read_text(), "mutations", mutation_table())
    page.write_text(put(text, "shipped", shipped_table()))
