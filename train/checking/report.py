"""What a check says: text for a person, JSON for a program."""

from __future__ import annotations

import math
from typing import Any

from train.checking.check import Comparison, Report
from train.checking.compare import Difference
from train.checking.shrink import Subject, changes
from train.checking.switches import Switch
from train.settings.config import Config

ONCE = ("loss", "gradient norm", "exchange", "slope")
"""Kinds of which the worst is shown; of parameters each."""

WIDTH = 82
"""Columns of a name."""


def as_text(report: Report) -> str:
    """Return the report for a terminal."""
    lines = []
    for comparison in report.comparisons:
        subject = comparison.subject
        lines += [f"{report.config.name}: {subject.describe()}"]
        lines += [f"  {subject.ranks} processes against one, three steps; {_shrunk(report)}", ""]
        lines += _tables(comparison, report.own)
    if not report.comparisons:
        lines += _table([_worst(report.own)])
    return "\n".join([*lines, *_verdict(report)])


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values; errors and tolerances are relative."""
    subject = report.comparisons[0].subject if report.comparisons else None
    return {
        "name": report.config.name,
        "equal": report.passes,
        "seconds": round(report.seconds, 1),
        "shrunk": {} if subject is None else _changed(report.config, subject),
        "one_process": [_row(each) for each in report.own],
        "comparisons": [
            {
                "layout": comparison.subject.describe(),
                "precision": comparison.subject.config.train.precision,
                "ranks": comparison.subject.ranks,
                "failure": comparison.failure,
                "differences": [_row(each) for each in comparison.differences],
            }
            for comparison in report.comparisons
        ],
        "switches": None
        if report.switches is None
        else [switch.describe() for switch in report.switches],
    }


def first_off(report: Report) -> Difference | None:
    """Return what was out of tolerance first: the rest may follow from it.

    By step, then the ring alone, loss, gradient, norm, weight; of these the furthest. None where
    nothing is, or a rank failed before it could tell.
    """
    order = ["slope", "exchange", "loss", "gradient", "gradient norm", "weight"]
    last = report.comparisons[-1].differences if report.comparisons else report.own
    return min(
        (each for each in last if not each.passes),
        key=lambda each: (each.step, order.index(each.kind), -each.excess),
        default=None,
    )


def parameter_off(report: Report) -> Difference | None:
    """Return the parameter whose gradient is furthest out of tolerance, in the first such step."""
    last = report.comparisons[-1].differences if report.comparisons else report.own
    off = [each for each in last if each.kind in ("gradient", "slope") and not each.passes]
    return min(off, key=lambda each: (each.step, -each.excess), default=None)


def name_switches(switches: list[Switch]) -> str:
    """Return them as text: the first with the others."""
    first, *rest = (switch.describe() for switch in switches)
    return first + (f" with {' and '.join(rest)}" if rest else "")


def _changed(config: Config, subject: Subject) -> dict[str, Any]:
    return {key: [was, now] for key, was, now in changes(config, subject)}


def _shrunk(report: Report) -> str:
    """Say what the layout was, if the check has less of it."""
    was, now = report.config.parallel, report.comparisons[0].subject.config.parallel
    less = [
        f"{name} {before} -> {after}"
        for name, before, after in (("tp", was.tp, now.tp), ("cp", was.cp, now.cp))
        if before != after
    ]
    return "shrunk in width, layers and length" + "".join(f", {each}" for each in less)


def _tables(comparison: Comparison, own: list[Difference]) -> list[str]:
    if comparison.failure is not None:
        return ["  a rank failed:", *(f"    {line}" for line in comparison.failure.splitlines())]
    found = [*comparison.differences, *own]
    by_kind = [[each for each in found if each.kind == kind] for kind in ONCE]
    lines = _table([_worst(some) for some in by_kind if some])
    lines += [
        f"  {'each parameter':{WIDTH}} {'gradient':>9} {'limit':>8} {'weight':>9} {'limit':>8}"
    ]
    gradients, weights = (_by_name(found, kind) for kind in ("gradient", "weight"))
    for name, weight in weights.items():
        gradient = gradients.get(name)
        shown = f"{'frozen':>9} {'':>8}" if gradient is None else _numbers(gradient)
        lines.append(f"  {name:{WIDTH}} {shown} {_numbers(weight)}{_mark(gradient, weight)}")
    return [*lines, ""]


def _table(rows: list[Difference]) -> list[str]:
    lines = [f"  {'largest relative error':{WIDTH}} {'error':>9} {'limit':>8}"]
    lines += [f"  {each.describe():{WIDTH}} {_numbers(each)}{_mark(each)}" for each in rows]
    return [*lines, ""]


def _numbers(each: Difference) -> str:
    return f"{each.error:9.1e} {each.tolerance:8.0e}"


def _mark(*some: Difference | None) -> str:
    return "" if all(each is None or each.passes for each in some) else "  <-"


def _by_name(found: list[Difference], kind: str) -> dict[str, Difference]:
    """Return each parameter's worst step."""
    worst: dict[str, Difference] = {}
    for each in found:
        if each.kind == kind:
            worst[each.name] = _worst([each, *filter(None, [worst.get(each.name)])])
    return worst


def _worst(some: list[Difference]) -> Difference:
    return max(some, key=lambda each: each.excess)


def _verdict(report: Report) -> list[str]:
    if report.passes:
        return [f"equal to one plain process within tolerance ({report.seconds:.0f} s)"]
    lines = [f"NOT EQUAL to one plain process ({report.seconds:.0f} s)"]
    first, parameter = first_off(report), parameter_off(report)
    if first is None:
        lines.append("  what is off: a rank failed, its traceback is above")
    else:
        lines.append(f"  what is off first: {_found(first)}")
        if parameter is not None and parameter != first:
            lines.append(f"  the parameter furthest off: {_found(parameter)}")
    if not report.switches:
        return [*lines, "  it breaks with every switch off: in the model or the engine itself"]
    rest = "without it" if len(report.switches) == 1 else "without any one of them"
    names = name_switches(report.switches)
    return [*lines, f"  what breaks it: {names} ({rest} it is equal)"]


def _found(each: Difference) -> str:
    return f"{each.describe()}: relative error {each.error:.1e}, tolerance {each.tolerance:.0e}"


def _row(each: Difference) -> dict[str, Any]:
    error = each.error if math.isfinite(each.error) else None  # JSON has no NaN
    return {**each._asdict(), "error": error, "passes": each.passes}
