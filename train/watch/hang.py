"""A hang in words: which rank keeps the others waiting, and how far each had come."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from train.watch.peers import Report

_SHOWN = 64
"""Ranks that are listed one by one; of more, those that differ from the most."""


def describe_hang(reports: Sequence[Report], world_size: int, problem: str | None = None) -> str:
    """Return the text of a hang: its suspects first, then every rank, then what to do.

    reports: of the ranks that ever said something, in their order. problem: with the store.
    """
    stuck = [report for report in reports if report.stuck]
    longest = max(stuck, key=lambda report: report.still_s)
    lines = [
        f"HANG at {longest.place}: no rank made progress for {longest.still_s:.0f} s (limit"
        f" {longest.limit_s:.0f} s); the job ends"
    ]
    lines += _suspects(reports, world_size)
    if problem is not None:
        lines.append(f"the ranks' store does not answer, so the others are not known: {problem}")
    lines += _places(reports)
    lines.append(
        "what to do: start the same command again, it goes on from its newest checkpoint; where a"
        " node is suspected again, leave it out; where every rank is in one place and only slow,"
        " raise parallel.hang_factor or parallel.timeout_s"
    )
    return "\n".join(lines)


def _suspects(reports: Sequence[Report], world_size: int) -> list[str]:
    """Return lines naming ranks that are silent, or not where the most of the others wait."""
    known = {report.rank for report in reports}
    lines = []
    if lost := [str(rank) for rank in range(world_size) if rank not in known]:
        lines.append(f"suspect: ranks {', '.join(lost)} never said anything")
    for report in reports:
        if not report.stuck:
            age = max(0.0, time.time() - report.time)
            lines.append(
                f"suspect: rank {report.rank} on {report.node} is silent since {age:.0f} s"
                f" (stopped, or its node is lost), last seen at {report.place}"
            )
    stuck = [report for report in reports if report.stuck]
    if lines or not stuck:
        return lines
    outside = [report for report in stuck if (report.waits or "").startswith("no collective")]
    if 0 < len(outside) < len(stuck):
        return [
            f"suspect: rank {report.rank} on {report.node} is in {report.waits}, while others wait"
            " in a collective"
            for report in outside
        ]
    usual, count = Counter(_where(report) for report in stuck).most_common(1)[0]
    if 2 * count > len(stuck):
        return [
            f"suspect: rank {report.rank} on {report.node} waits elsewhere than the most:"
            f" {report.waits}"
            for report in stuck
            if _where(report) != usual
        ]
    return ["suspect: the ranks wait in different collectives, see below"] * (len(stuck) > 1)


def _where(report: Report) -> str:
    """Return what is the same for ranks that wait in one collective, whatever their group."""
    return f"{report.place.step} {(report.waits or '').rpartition(', ')[2]}"


def _places(reports: Sequence[Report]) -> list[str]:
    shown = list(reports)
    lines = []
    if len(shown) > _SHOWN:
        usual = Counter(_where(report) for report in shown).most_common(1)[0][0]
        rest = [report for report in shown if _where(report) != usual]
        same = next(report for report in shown if _where(report) == usual)
        lines.append(f"{len(shown) - len(rest)} ranks are where rank {same.rank} is")
        shown = [same, *rest[: _SHOWN - 1]]
    for report in shown:
        text = f"rank {report.rank} on {report.node}: {report.place}"
        if report.waits is not None:
            text += f"; in {report.waits}; still for {report.still_s:.0f} s"
        lines.append(text)
        lines += [f"    last begun in {collective}" for collective in report.collectives]
    return lines
