"""Traces of chosen steps and ranks; what memory held when it ran out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.train.attempts import finish, losses
from tests.train.tiny import Shards, tiny
from train.settings.config import ConfigError, validate
from train.speed.profiling import FOLDER, snapshot_memory


@pytest.mark.gloo
def test_chosen_steps_of_chosen_ranks_are_traced_and_nothing_else_changes(
    tmp_path: Path, shards: Shards
) -> None:
    profile = {"first": 3, "steps": 2, "ranks": [1]}
    traced = validate(tiny(tmp_path / "traced", shards, train__steps=5, train__profile=profile))
    plain = validate(tiny(tmp_path / "plain", shards, train__steps=5))
    said = finish(2, traced)
    finish(2, plain)
    assert losses(traced.run_dir) == losses(plain.run_dir)
    assert not (plain.run_dir / FOLDER).exists()
    folder = traced.run_dir / FOLDER
    names = ["step-00003-rank-1.json.gz", "step-00003-rank-1.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert "aten::mm" in (folder / names[1]).read_text()
    events = json.loads(gzip.decompress((folder / names[0]).read_bytes()))["traceEvents"]
    layers = [event for event in events if event.get("name") == "layer 1"]
    micro_batches = traced.train.batch_size // 2 // traced.train.micro_batch
    windows = traced.data.sample_len // (traced.train.bptt_len or traced.data.sample_len)
    assert len(layers) == 2 * micro_batches * windows, said


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        ({"first": 5, "steps": 3}, "train.profile.first: 5 and the 2 steps behind it"),
        ({"ranks": [0, 2]}, "train.profile.ranks: 2 is not among the 2 ranks; use 0 to 1"),
    ],
)
def test_what_would_not_be_traced_is_refused(
    profile: dict[str, object], problem: str, tmp_path: Path, shards: Shards
) -> None:
    raw = tiny(tmp_path, shards, train__steps=6, train__profile=profile)
    with pytest.raises(ConfigError, match=problem):
        validate(raw, world_size=2)


def test_a_snapshot_is_written_where_memory_ran_out_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("held")
    )
    snapshot_memory(ValueError("no"), tmp_path, 0)
    assert not list(tmp_path.iterdir())
    snapshot_memory(torch.OutOfMemoryError("CUDA out of memory"), tmp_path, 3)
    path = tmp_path / FOLDER / "out-of-memory-rank-3.pickle"
    assert path.read_text() == "held" and str(path) in capfd.readouterr().err
