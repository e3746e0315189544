"""Training with damaged data left out: said, counted, written down, and the same on all ranks."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.index import Corpus
from tests.ranks import run_ranks
from tests.train.attempts import finish, forked, pretrain, read_rows
from tests.train.tiny import Shards, prepare_shards, tiny
from train.reading.left_out import LeftOut
from train.reading.verify import verify
from train.settings.config import Config, validate
from train.tracking.timeline import read_events

pytestmark = pytest.mark.gloo


@pytest.fixture
def damaged(tmp_path: Path) -> Shards:
    """Shards of which every document but one has a flipped bit."""
    shards = prepare_shards(tmp_path / "damaged")
    damage(shards.train, keep=1)
    return shards


def damage(folder: Path, keep: int) -> None:
    corpus = Corpus.open(folder)
    for document in range(keep, corpus.documents):
        table, row = corpus._row(document)
        path = folder / table.shard.name
        content = bytearray(path.read_bytes())
        content[int(table.offsets[row])] ^= 4
        path.write_bytes(content)


def config_of(run: Path, shards: Shards, **changes: object) -> Config:
    options = {"data__on_damage": "skip", "train__steps": 4, "train__log_every": 2}
    return validate(tiny(run, shards, **(options | changes)))


def test_what_is_left_out_is_told_once_counted_and_verified(
    tmp_path: Path, damaged: Shards
) -> None:
    config = config_of(tmp_path / "run", damaged)
    text = finish(2, config)
    events = [event for event in read_events(config.run_dir) if event["kind"] == "left_out"]
    told = [entry for event in events for entry in event["left_out"]]
    assert told and len(told) == len(set(told))
    assert all("has crc32" in entry and str(damaged.train) in entry for entry in told)
    assert events[0]["text"] in text and "left out as damaged" in text
    assert text.count(told[0]) == 1
    (said,) = [line for line in verify([config.run_dir]).sentences if "left out" in line]
    assert f"{len(told)} damaged documents or files" in said and told[0] in said
    rows = read_rows(config.run_dir)
    assert all(row["targets"] < config.train.batch_size * config.data.sample_len for row in rows)


class Mixed:
    """Of two corpora, whose damage stands one behind the other's."""

    def __init__(self) -> None:
        self.parts: list[list[str]] = [["a1"], ["b1"]]

    @property
    def damage(self) -> tuple[str, ...]:
        return tuple(text for part in self.parts for text in part)


def heard_of_a_mixture() -> list[list[str]]:
    mixed = Mixed()
    left_out = LeftOut(mixed, torch.device("cpu"))  # type: ignore[arg-type]
    told = [left_out.news()]
    mixed.parts[0].append("a2")  # before b1, which is known
    return [*told, left_out.news(), left_out.news()]


def test_damage_in_the_first_corpus_of_a_mixture_is_told_as_well() -> None:
    for told in run_ranks(2, heard_of_a_mixture):
        assert told == [["a1", "b1"], ["a2"], []]


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path, shards: Shards) -> None:
    config = config_of(tmp_path / "run", shards)
    assert "left out" not in finish(1, config)
    assert verify([config.run_dir]).values["runs"][0]["left_out"] == []


def pretrain_in_its_folder(config: Config, folders: list[Path]) -> int:
    """Train with relative paths: each rank is on a node of its own, with a copy of the shards."""
    os.chdir(folders[dist.get_rank()])
    return pretrain(config)


def test_a_document_damaged_on_one_node_of_a_sequence_ends_the_run(
    tmp_path: Path, damaged: Shards
) -> None:
    whole = prepare_shards(tmp_path / "whole")
    config = config_of(tmp_path / "run", Shards(Path("train"), damaged.valid), parallel__cp=2)
    folders = [whole.train.parent, damaged.train.parent]
    with forked(2, config.run_dir, pretrain_in_its_folder, config, folders) as attempt:
        codes = attempt.wait()
        text = attempt.text()
    assert codes != [0, 0] and all(codes), text
    assert "ranks that share a sequence read different data" in text
    assert "has crc32" in text  # which document
