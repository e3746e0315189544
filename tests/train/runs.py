"""A small valid configuration that tests change, and the command line: as a process, or here."""

import copy
import io
import json
import os
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import yaml

from train.settings.config import ConfigError, validate

ROOT = Path(__file__).resolve().parents[2]

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 128,
    },
    "data": {"train": "shards/train", "segment_len": 64, "sample_len": 256},
    "train": {"steps": 100, "batch_size": 8, "lr": 0.001},
}


def small(**changes: object) -> dict[str, Any]:
    """Return the small configuration with dotted keys (`train__steps=5`) changed."""
    raw = copy.deepcopy(SMALL)
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = raw
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return raw


def problems(raw: dict[str, Any], world_size: int | None = None) -> tuple[str, ...]:
    """Return the problem lines of a configuration, which must have some."""
    with pytest.raises(ConfigError) as caught:
        validate(raw, world_size=world_size)
    return caught.value.problems


def write(folder: Path, raw: object) -> Path:
    """Return the path of a YAML file with these values (or this text)."""
    path = folder / "run.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
    return path


def longhaul(
    *arguments: object, code: str = "from train.cli import main; main()", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own and return how it ended."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,  # never waited for in a good run
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
    )


class Ended(NamedTuple):
    """How a command line ended."""

    returncode: int
    stdout: str
    stderr: str


def longhaul_here(*arguments: object, **environment: str) -> Ended:
    """Run the command line in this process, as its entry point does: a second sooner.

    For what it says, not for what it imports; not for commands that set signal handlers.
    """
    from train.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    with (
        mock.patch.dict(os.environ, inherited | environment, clear=True),
        mock.patch.object(sys, "argv", ["longhaul", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.StringIO()),  # nobody answers
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int), end.code
            code = end.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    return Ended(code, out.getvalue(), err.getvalue())


_ONE_BY_ONE = """
import contextlib, io, json, sys
from train.cli import main
commands, names = map(json.loads, sys.argv[1:])
found = []
for words in commands:
    sys.argv = ["longhaul", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main()
    found.append(sorted(set(names) & set(sys.modules)))
print(json.dumps(found))
"""


def imported(names: set[str], commands: list[list[Any]]) -> dict[str, list[str]]:
    """Return which modules of these names a fresh process has after each command, one by one."""
    words = [[str(word) for word in command] for command in commands]
    done = longhaul(json.dumps(words), json.dumps(sorted(names)), code=_ONE_BY_ONE)
    assert done.returncode == 0, done.stderr
    lines = (" ".join(command) for command in words)
    return dict(zip(lines, json.loads(done.stdout), strict=True))
