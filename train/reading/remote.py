"""What a run's URLs are read with."""

from __future__ import annotations

import os
import sys

from data.cache import Cache
from data.remote import Patience, Remote
from train.settings.config import Config


def open_remote(config: Config) -> Remote | None:
    """Return the cache and the patience that data.* asks for, None where there is no cache.

    Raises ValueError where its folder cannot be written.
    """
    data = config.data
    if data.cache_dir is None:
        return None
    patience = Patience(data.fetch_attempts, data.fetch_timeout_s)
    return Remote(Cache(data.cache_dir, data.cache_bytes), patience, _say)


def _say(text: str) -> None:
    """Print at once, on whichever rank: while a step waits for data nothing else is printed."""
    print(f"[rank {os.environ.get('RANK', '0')}] {text}", file=sys.stderr, flush=True)
