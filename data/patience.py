"""Reads that wait for a file system which is away for a while, as a network's may be."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

AWAY = frozenset({
    errno.EIO, errno.EREMOTEIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.ENXIO,
    errno.ENODEV, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED,
})  # fmt: skip
"""What a lost server looks like; a missing file or a refused access is not among them."""
WAITS_S = (0.5, 1.5, 3.0, 5.0, 10.0, 20.0, 30.0)
"""70 s in all. Failover of a file server takes tens of seconds."""


def is_away(error: OSError) -> bool:
    """Return whether the file system may come back."""
    return error.errno in AWAY


def patiently(
    action: Callable[[], T], what: object, before_again: Callable[[], None] = lambda: None
) -> T:
    """Return what the action returns, tried again while the file system is away.

    what: named in a line on stderr for each wait. before_again: called before each further attempt;
    an OSError of it counts as the action's. Raises the last OSError after WAITS_S, others at once.
    """

    def again() -> T:
        before_again()
        return action()

    attempt = action
    for wait_s in WAITS_S:
        try:
            return attempt()
        except OSError as error:
            if not is_away(error):
                raise
            print(f"{what}: {error}; again in {wait_s:.1f} s", file=sys.stderr, flush=True)
        time.sleep(wait_s)
        attempt = again
    return attempt()
