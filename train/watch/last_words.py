"""The last lines of a run that fails: what happened, and what to do."""

from __future__ import annotations

import errno
import re

_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|timed out waiting|broken pipe|socket|remote process exited",
    re.IGNORECASE,
)


def is_echo(error: BaseException) -> bool:
    """Return whether an error only says that another rank went first."""
    return type(error).__name__ in ("RuntimeError", "DistBackendError", "DistNetworkError") and (
        _LOST_PEER.search(str(error)) is not None
    )


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def remedy(error: BaseException, planned: str = "") -> str:
    """Return what to do about an error that ended a run.

    planned: the largest parts of a rank's memory, and how to shrink the first.
    """
    if is_echo(error):
        return "another rank or node ended first: its message, above or in its log, has the cause"
    if out_of_memory(error):
        largest = f"; the plan's largest parts are {planned}" if planned else ""
        return (
            "lower train.micro_batch or train.loss_chunk, set train.checkpointing: block, or raise"
            f" parallel.cp, parallel.tp or parallel.zero{largest}"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free disk space or raise the quota (longhaul checkpoint ls tells what is kept)"
    if isinstance(error, OSError):
        return "look at the file system that is named; then start the same command again"
    if isinstance(error, FloatingPointError):
        return "follow the message: it names the samples; longhaul status shows what came before"
    return "the traceback above is the cause; the same command goes on once it is mended"


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)


def last_words(
    error: BaseException,
    *,
    run: str,
    rank: int,
    node: str,
    checkpoint: str | None,
    command: str,
    planned: str = "",
) -> str:
    """Return the last lines of a rank that an error ended.

    checkpoint: the newest there is. planned: see `remedy`.
    """
    kept = f"{checkpoint}; it is gone on from by: {command}" if checkpoint else "none yet"
    return "\n".join(
        (
            f"[rank {rank} on {node}] run {run} failed: {first_line(error)}",
            f"  what to do: {remedy(error, planned)}",
            f"  checkpoint: {kept}",
        )
    )
