"""What a corpus's folder is called: a path, or a URL, shown without what may be secret in it."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

# Two letters at least: C:/ is a drive.
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)")


def url_of(folder: str | Path) -> str | None:
    """Return the URL that a folder's name is, None for a path.

    A Path has folded the // of a URL to /, so one slash is enough here.
    """
    match = _URL.fullmatch(str(folder))
    if match is None:
        return None
    return f"{match[1]}://{'/' if match[1] in ('file', 'local') else ''}{match[2]}"


def shown_url(url: str) -> str:
    """Return a URL for messages: without user, password, query."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def shown_folder(folder: str | Path) -> str:
    """Return how messages name a corpus: its path, or its URL without secrets."""
    url = url_of(folder)
    return str(folder) if url is None else shown_url(url)
