"""The nodes of a job compare themselves, before any rank is started, and name those that are unfit.

They meet through files in the run folder's `attempt/`, because a network that does not work is one
of the things to be found: each leaves what it found of itself; whoever first sees all of them, or
has waited long enough, writes down who is whole; those measure the ring; the first of them judges
it and writes `fit`, a node a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from data.durable import write_atomically
from train.cluster.failure import FOLDER
from train.cluster.preflight import Found

WAIT_S = 45.0
"""For nodes that are slow to start; together with the ring under two minutes, whatever fails."""
SLOW = 0.3
"""Of the median rate: a node all of whose pairs are slower is left out."""
FEW_PAIRS = 4
"""With fewer there is no telling which is slow."""


def meet(
    run_dir: Path,
    here: str,
    addresses: Mapping[str, str],
    found: Sequence[Found],
    say: Callable[[str], None],
    wait_s: float = WAIT_S,
) -> bool:
    """Return whether this node is fit; the first node that is whole says and writes the result.

    addresses: of all the job's nodes by name, in their order; here: this one's name.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import Store

    from train.cluster.ring import measure_ring

    folder = run_dir / FOLDER
    problems = [each.problem for each in found if each.problem]
    server = None
    if not problems:  # a node that hosts the store must be whole; its port travels in its file
        server = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
    port = None if server is None else server.port
    mine = {"problems": problems, "port": port}
    write_atomically(folder / f"preflight-{here}.json", json.dumps(mine))
    reports = _gather(folder, list(addresses), wait_s)
    whole = [node for node in addresses if node in reports and not reports[node]["problems"]]
    if here not in whole:
        return False
    limit = timedelta(seconds=60)
    head = whole[0]
    store: Store = TCPStore(addresses[head], reports[head]["port"], is_master=False, timeout=limit)
    rates = measure_ring(whole, here, store)
    store.set_timeout(limit)  # the pairs had their own
    store.set(here, json.dumps(rates))
    if here == head:
        pairs: dict[str, float | None] = {}
        for node in whole:
            with contextlib.suppress(RuntimeError):
                pairs |= json.loads(store.get(node))
        unfit = judge(list(addresses), reports, pairs)
        fit = [node for node in addresses if node not in unfit]
        _tell(fit, unfit, pairs, say)
        write_atomically(folder / "fit", "".join(f"{node}\n" for node in fit))
        store.set("judged", "")
    with contextlib.suppress(RuntimeError):
        store.get("judged")
    return here in _lines(folder / "fit")


def judge(
    nodes: Sequence[str],
    reports: Mapping[str, Mapping[str, Any]],
    pairs: Mapping[str, float | None],
) -> dict[str, str]:
    """Return the unfit nodes, and why. pairs: GB/s by `a b`, None where there was no answer."""
    unfit = {}
    known = [rate for rate in pairs.values() if rate is not None]
    limit = SLOW * statistics.median(known) if len(known) >= FEW_PAIRS else 0.0
    for node in nodes:
        if node not in reports:
            unfit[node] = "said nothing"
            continue
        if reports[node]["problems"]:
            unfit[node] = "; ".join(reports[node]["problems"])
            continue
        own = [rate for pair, rate in pairs.items() if node in pair.split()]
        if own and all(rate is None for rate in own):
            unfit[node] = "no neighbour could reach it"
        elif own and limit and all(rate is None or rate < limit for rate in own):
            best = max(rate for rate in own if rate is not None)
            unfit[node] = f"its network is slow: {best:.2f} GB/s, the median is {limit / SLOW:.2f}"
    return unfit


def _gather(folder: Path, nodes: Sequence[str], wait_s: float) -> dict[str, dict[str, Any]]:
    """Return the reports that count, the same on all nodes: those there when the first one looked.

    A report that comes later is of a node that is too slow.
    """
    agreed, until = folder / "reports.json", time.monotonic() + wait_s
    while True:
        paths = {node: folder / f"preflight-{node}.json" for node in nodes}
        there = {node: path for node, path in paths.items() if path.exists()}
        if len(there) == len(nodes) or time.monotonic() > until or agreed.exists():
            break
        time.sleep(0.1)
    reports = {node: json.loads(path.read_text()) for node, path in there.items()}
    own = folder / f"reports-{os.getpid()}-{time.time_ns()}"
    own.write_text(json.dumps(reports))
    with contextlib.suppress(FileExistsError):
        os.link(own, agreed)  # whole or not at all, and only the first
    own.unlink()
    found: dict[str, dict[str, Any]] = json.loads(agreed.read_text())
    return found


def _tell(
    fit: list[str],
    unfit: Mapping[str, str],
    pairs: Mapping[str, float | None],
    say: Callable[[str], None],
) -> None:
    for node, why in unfit.items():
        say(f"preflight: {node} is unfit: {why}")
    rates = sorted((rate, pair) for pair, rate in pairs.items() if rate is not None)
    said = f"preflight: {len(fit)} of {len(fit) + len(unfit)} nodes fit"
    if rates:
        (low, pair), (high, _) = rates[0], rates[-1]
        between = pair.replace(" ", " and ")
        said += f"; neighbours add up {low:.2f} ({between}) to {high:.2f} GB/s"
    say(said)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except FileNotFoundError:
        return []
