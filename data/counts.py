"""Segments of each shard, kept in a small file: the pass over all indices is done once a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from data.durable import write_atomically
from data.passes import Int64Array
from data.wide import WideCorpus

FORMAT = "longhaul-segments-1"


def counts_file(folder: Path, corpus: WideCorpus, segment_len: int) -> Path:
    """Return where the counts of a corpus lie in a folder; others lie beside them."""
    return folder / f"segments-{corpus.fingerprint[:16]}-{segment_len}.json"


def read_counts(path: Path, corpus: WideCorpus, segment_len: int) -> Int64Array | None:
    """Return the segments of each shard; None where the file is missing, damaged or another's."""
    try:
        values = json.loads(path.read_bytes())
        hashed = values.pop("sha256")
        counts = np.array(values["segments"], dtype=np.int64)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    expected = {"format": FORMAT, "corpus": corpus.fingerprint, "segment_len": segment_len}
    same = {name: values[name] for name in values if name != "segments"} == expected
    return counts if same and hashed == _hash(values) else None


def write_counts(path: Path, corpus: WideCorpus, segment_len: int, counts: Int64Array) -> None:
    """Write the segments of each shard."""
    values = {
        "format": FORMAT,
        "corpus": corpus.fingerprint,
        "segment_len": segment_len,
        "segments": counts.tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**values, "sha256": _hash(values)}).encode())


def _hash(values: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
