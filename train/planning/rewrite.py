"""Puts values into a YAML file and leaves its comments and order as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml


def rewrite(text: str, changes: Mapping[str, Any]) -> str:
    """Return a configuration file's text with `section.key` values set.

    A key that is there keeps its line and comment; others are put first in their section. Raises
    ValueError where the file's sections are not written one key a line.
    """
    wanted = yaml.safe_load(text)
    written = text
    for path, value in changes.items():
        section, key = path.split(".")
        wanted.setdefault(section, {})[key] = value
        written = _set(written, section, key, value)
    twice = any(len(re.findall(rf"^{section}:", written, re.MULTILINE)) > 1 for section in wanted)
    if twice or yaml.safe_load(written) != wanted:
        raise ValueError(
            "the values could not be written: give the file's sections one key a line each, or"
            " give the values as overrides: " + " ".join(f"{k}={v}" for k, v in changes.items())
        )
    return written


def _set(text: str, section: str, key: str, value: Any) -> str:
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if re.match(rf"{section}:\s*(#.*)?$", line)]
    if not heads:
        return text.rstrip("\n") + f"\n\n{section}:\n  {key}: {value}\n"
    first = heads[0] + 1
    end = next((i for i in range(first, len(lines)) if re.match(r"\S", lines[i])), len(lines))
    for i in range(first, end):
        found = re.match(rf"(\s+{key}:\s*)([^#\s]+)(.*)$", lines[i])
        if found:
            lines[i] = f"{found[1]}{value}{found[3]}"
            break
    else:
        lines.insert(first, f"  {key}: {value}")
    return "\n".join(lines) + "\n"
