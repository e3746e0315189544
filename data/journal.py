"""What a prepare has finished, kept on disk, so that a killed one continues.

`<output>/.prepare` exists while a prepare is under way: its settings, its tokenizer and one
line for each finished shard, written after the shard is durable. `<output>/prepare.json`
comes at the very end and says that the output is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.durable import sync, write_atomically
from data.files import LocalFiles
from data.index import read_index
from data.shards import INDEX_SUFFIX, MANIFEST, TOKENIZER, Shard
from data.split import Side
from data.wording import counted, short_tokens

FINISHED = "prepare.json"
SIDES: tuple[Side, ...] = ("train", "valid")
_WORK = ".prepare"
_SETTINGS = "settings.json"
_SHARDS = "shards.jsonl"

# (number of the block, number of the document in it): the next one a side has not got yet.
Cursor = tuple[int, int]


@dataclass
class Progress:
    """One side so far: its finished shards and where the documents behind them begin."""

    shards: list[Shard] = field(default_factory=list)
    cursor: Cursor = (0, 0)
    empty: int = 0


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold `output` for one prepare; ValueError if another one is writing there."""
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another `longhaul prepare` is writing to {output}; wait for it, or choose"
                f" another output"
            ) from error
        except OSError:
            # Some network file systems lock no folders. Then it is on the user.
            pass
        yield
    finally:
        os.close(descriptor)


class Journal:
    """The state of one output folder; the folder must be `claimed`."""

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.output = output
        self._settings = dict(settings)
        self._work = output / _WORK

    def clear(self) -> None:
        """Remove what an earlier prepare wrote (and nothing else): --force.

        ValueError where the folder holds something, but nothing says that it is ours.
        """
        if not self._is_ours():
            self._require_empty()
            return
        for side in SIDES:
            folder = self.output / side
            # The manifest first: without it nobody opens what is left half removed.
            (folder / MANIFEST).unlink(missing_ok=True)
            for pattern in ("shard-*.tar", f"shard-*.tar{INDEX_SUFFIX}", "*.tmp", TOKENIZER):
                for path in folder.glob(pattern):
                    path.unlink()
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        shutil.rmtree(self._work, ignore_errors=True)
        (self.output / FINISHED).unlink(missing_ok=True)

    def finished(self) -> dict[str, Any] | None:
        """Return the summary of a finished output with the same settings, else None.

        ValueError names what differs, where something was made with other settings: a finished
        shard, or all of it. What failed or was killed before its first shard binds nobody.
        """
        for path in (self.output / FINISHED, self._work / _SETTINGS):
            if path.is_file():
                written = json.loads(path.read_bytes())
                different = _differences(written["settings"], self._settings)
                if path.name != FINISHED and not self._recorded():
                    if different:
                        self.clear()  # a tokenizer of other settings, too
                    return None
                self._require_same(different)
                if path.name == FINISHED:
                    shutil.rmtree(self._work, ignore_errors=True)
                    return dict(written["summary"])
                return None
        self._require_empty()
        return None

    def begin(self) -> None:
        """Write down the settings, before the first shard."""
        self._work.mkdir(exist_ok=True)
        if not (self._work / _SETTINGS).is_file():
            text = json.dumps({"settings": self._settings}, indent=1)
            write_atomically(self._work / _SETTINGS, text.encode())
            sync(self.output)

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer of this prepare lies, for its workers and for continuing."""
        return self._work / TOKENIZER

    def record(self, side: Side, shard: Shard, cursor: Cursor, empty: int) -> None:
        """Add a finished shard: it is never written again.

        `empty` counts the empty documents in the blocks before the cursor's.
        """
        entry = {"side": side, "shard": asdict(shard), "cursor": cursor, "empty": empty}
        with open(self._work / _SHARDS, "ab") as stream:
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        sync(self._work)

    def read(self, dtype: np.dtype[Any]) -> dict[Side, Progress]:
        """Return what was finished before; ValueError if a recorded shard is gone."""
        sides: dict[Side, Progress] = {side: Progress() for side in SIDES}
        for line in self._recorded():
            entry = json.loads(line)
            progress = sides[entry["side"]]
            progress.shards.append(self._checked(entry["side"], Shard(**entry["shard"]), dtype))
            progress.cursor = (entry["cursor"][0], entry["cursor"][1])
            progress.empty = entry["empty"]
        return sides

    def _recorded(self) -> list[bytes]:
        """Return the lines of the finished shards; a last one cut short is removed."""
        path = self._work / _SHARDS
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))  # killed while writing the last line
        return whole.splitlines()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Say that the output is complete."""
        text = json.dumps({"settings": self._settings, "summary": dict(summary)}, indent=1)
        write_atomically(self.output / FINISHED, text.encode() + b"\n")
        shutil.rmtree(self._work)

    def _checked(self, side: Side, shard: Shard, dtype: np.dtype[Any]) -> Shard:
        files = LocalFiles(self.output / side)
        fault = files.fault(shard)
        if fault is None:
            try:
                read_index(files, shard, dtype)
            except ValueError as error:
                fault = str(error)
        if fault:
            raise ValueError(f"this prepare cannot be continued: {fault}")
        return shard

    def _is_ours(self) -> bool:
        return (self.output / FINISHED).is_file() or (self._work / _SETTINGS).is_file()

    def _require_empty(self) -> None:
        # .prepare without settings is a prepare that was killed before it began.
        found = sorted(path.name for path in self.output.iterdir() if path.name != _WORK)
        if found:
            raise ValueError(
                f"{self.output} holds files that `longhaul prepare` did not write ({found[0]}"
                f"{' and more' if found[1:] else ''}); choose an empty or a new folder"
            )

    def _require_same(self, different: Sequence[str]) -> None:
        if different:
            raise ValueError(
                f"{self.output} was prepared with other settings: {'; '.join(different)};"
                f" use those, choose another output, or prepare it again with --force"
            )


def _differences(written: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ, each as a user writes it."""
    now = json.loads(json.dumps(now))
    return [
        _difference(name, written[name], now[name])
        for name in sorted(now)
        if written[name] != now[name]
    ]


def _difference(name: str, there: Any, now: Any) -> str:
    if name == "inputs":
        if (there["files"], there["bytes"]) == (now["files"], now["bytes"]):
            return "other input files, or the same ones with other names or times"
        return f"inputs of {_size(there)} there, {_size(now)} now"
    if name == "tokenizer":
        exact = _tokenizer(there) == _tokenizer(now)
        return f"{_tokenizer(there, exact)} there, {_tokenizer(now, exact)} now"
    if name == "shard_tokens":
        there, now = short_tokens(there), short_tokens(now)
    # The command line has no --seed.
    option = name if name == "seed" else f"--{name.replace('_', '-')}"
    return f"{option} {there} there, {now} now"


def _tokenizer(setting: Mapping[str, Any], exact: bool = False) -> str:
    trained = setting.get("trained")
    if trained is not None:
        sample = f" on {trained['sample_bytes']:,} bytes" if exact else ""
        return f"--train-tokenizer {trained['vocab_size']}{sample}"
    return f"--tokenizer {setting['name']}{' of sha256 ' + setting['sha256'][:12] if exact else ''}"


def _size(inputs: Mapping[str, Any]) -> str:
    return f"{counted(inputs['files'], 'file')} and {counted(inputs['bytes'], 'byte')}"
