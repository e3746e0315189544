import json
from pathlib import Path

import pytest

from data.index import Corpus
from data.ledger import FOLDER, list_files
from tests.data.ledgers import consume, corpus_in
from tests.train.attempts import finish, forked, losses, pretrain_holding
from tests.train.runs import longhaul
from tests.train.tiny import LANES, Shards, tiny
from train.reading.verify import Finding, verify
from train.settings.config import Config, validate


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return corpus_in(tmp_path)


def sentences(finding: Finding) -> str:
    return "\n".join(finding.sentences)


# ledgers without a model


def test_a_ledger_without_checkpoints_is_read_as_far_as_it_goes(
    corpus: Corpus, tmp_path: Path
) -> None:
    consume(corpus, tmp_path / "a" / FOLDER, first=0, last=4, dp_size=3, torn=1)
    found = verify([tmp_path / "a"])
    assert found.good and found.values["runs"][0]["samples"] == 52
    assert "(it has no checkpoint): each exactly once" in sentences(found)


def test_equal_runs_of_different_length_are_compared_where_both_are(
    corpus: Corpus, tmp_path: Path
) -> None:
    consume(corpus, tmp_path / "a" / FOLDER, first=0, last=4)
    consume(corpus, tmp_path / "b" / FOLDER, first=0, last=6, dp_size=2)
    found = verify([tmp_path / "a", tmp_path / "b"])
    assert found.good
    assert "the same 48 samples in the same order" in sentences(found)
    assert f"compared is what both have; {tmp_path / 'b'} goes on to 72" in sentences(found)


def test_another_seed_is_found_and_named(corpus: Corpus, tmp_path: Path) -> None:
    consume(corpus, tmp_path / "a" / FOLDER, first=0, last=4)
    consume(corpus, tmp_path / "b" / FOLDER, first=0, last=4, seed=6)
    found = verify([tmp_path / "a", tmp_path / "b"])
    assert not found.good
    assert found.values["comparison"]["settings"] == {"seed": [5, 6]}
    assert found.values["comparison"]["first_difference"] == 0
    assert "the first that differs is sample 0 (step 1 of" in sentences(found)


def test_a_change_in_the_middle_is_found_where_it_begins(corpus: Corpus, tmp_path: Path) -> None:
    consume(corpus, tmp_path / "a" / FOLDER, first=0, last=6)
    consume(corpus, tmp_path / "b" / FOLDER, first=0, last=3)
    consume(corpus, tmp_path / "b" / FOLDER, first=3, last=6, seed=6)
    found = verify([tmp_path / "a", tmp_path / "b"])
    assert not found.good and [run["good"] for run in found.values["runs"]] == [True, True]
    assert 36 <= found.values["comparison"]["first_difference"] < 48
    assert "(step 4 of" in sentences(found)


def test_another_batch_size_is_said(corpus: Corpus, tmp_path: Path) -> None:
    consume(corpus, tmp_path / "a" / FOLDER, first=0, last=4, lanes=4)
    consume(corpus, tmp_path / "b" / FOLDER, first=0, last=4, lanes=6)
    found = verify([tmp_path / "a", tmp_path / "b"])
    assert not found.good and found.values["comparison"]["common"] == 16
    assert f"batch_size is 4 in {tmp_path / 'a'}, 6 in {tmp_path / 'b'}" in sentences(found)
    assert "with another batch_size documents lie in other lanes" in sentences(found)


def test_a_sample_that_came_twice_is_told_with_its_step(corpus: Corpus, tmp_path: Path) -> None:
    consume(corpus, tmp_path / "a" / FOLDER, first=0, last=2, dp_size=3)
    one, other, _ = list_files(tmp_path / "a" / FOLDER)
    line = other.read_bytes().split(b"\n")[0]
    other.write_bytes(line + b"\n" + one.read_bytes().split(b"\n", 1)[1])
    found = verify([tmp_path / "a"])
    assert not found.good and "twice: samples 0 to 3 (step 1)" in sentences(found)


def test_a_run_that_consumed_nothing_is_equal_to_none(corpus: Corpus, tmp_path: Path) -> None:
    consume(corpus, tmp_path / "a" / FOLDER, first=0, last=0)
    consume(corpus, tmp_path / "b" / FOLDER, first=0, last=4)
    found = verify([tmp_path / "a", tmp_path / "b"])
    assert not found.good and "have no sample in common" in sentences(found)


def test_a_folder_without_a_ledger_is_one_line_and_code_2(tmp_path: Path) -> None:
    done = longhaul("data", "verify", tmp_path)
    assert done.returncode == 2 and "holds no ledger" in done.stderr


# runs


def run_and_kill(config: Config, size: int, step: int) -> None:
    with forked(size, config.run_dir, pretrain_holding, config, step) as attempt:
        attempt.wait_for_rows(step)
        attempt.kill()


def killed_run(tmp_path: Path, shards: Shards, size: int, **changes: object) -> Path:
    config = validate(tiny(tmp_path / "run", shards, checkpoint__every=3, **changes))
    run_and_kill(config, size, 5)
    finish(size, config)
    return config.run_dir


def test_a_killed_and_resumed_run_consumed_every_sample_once(
    tmp_path: Path, shards: Shards
) -> None:
    run = killed_run(tmp_path, shards, 2, train__steps=8, data__workers=2)
    found = verify([run])
    assert found.good, sentences(found)
    (values,) = found.values["runs"]
    assert values["samples"] == 8 * LANES and values["checkpoint"] == "step-00000008"
    assert [attempt["start"] for attempt in values["attempts"]] == [0, 3 * LANES]
    assert values["redone"] >= 2 * LANES and values["changed"] == []
    assert f"{run}: 2 attempts, 32 samples up to step-00000008: each exactly once" in sentences(
        found
    )


@pytest.mark.slow
def test_4_2_3_and_6_ranks_consume_what_an_undisturbed_run_does(
    tmp_path: Path, shards: Shards
) -> None:
    changes: dict[str, object] = {"train__steps": 16, "train__batch_size": 12}
    whole = validate(tiny(tmp_path / "whole", shards, **changes))
    finish(1, whole)
    changes["checkpoint__every"] = 3
    for size, workers, kill_at in ((4, 1, 5), (2, 2, 8), (3, 0, 11), (6, 1, None)):
        config = validate(tiny(tmp_path / "run", shards, data__workers=workers, **changes))
        if kill_at is None:
            finish(size, config)
        else:
            run_and_kill(config, size, kill_at)
    found = verify([config.run_dir, whole.run_dir])
    assert found.good, sentences(found)
    values = found.values["runs"][0]
    assert [attempt["dp_size"] for attempt in values["attempts"]] == [4, 2, 3, 6]
    assert values["redone"] >= 3 * 2 * 12 - 12 and values["samples"] == 16 * 12
    assert "the same 192 samples in the same order" in sentences(found)
    same = [
        (mine[1], theirs[1])
        for mine, theirs in zip(losses(config.run_dir), losses(whole.run_dir), strict=True)
    ]
    for mine, theirs in same:
        assert mine == pytest.approx(theirs, rel=1e-5)  # sums over other numbers of ranks


def test_tensor_and_context_peers_write_nothing(tmp_path: Path, shards: Shards) -> None:
    layout: dict[str, object] = {"parallel__tp": 2, "parallel__cp": 2, "train__steps": 3}
    config = validate(tiny(tmp_path / "run", shards, **layout))
    finish(4, config)
    assert [path.name for path in list_files(config.run_dir / FOLDER)] == [
        "attempt-00001.rank-00000.ledger"
    ]
    assert verify([config.run_dir]).good


def test_the_command_line_compares_two_runs(tmp_path: Path, shards: Shards) -> None:
    run = killed_run(tmp_path, shards, 1, train__steps=6)
    whole = validate(tiny(tmp_path / "whole", shards, train__steps=6))
    finish(1, whole)
    done = longhaul("data", "verify", run, whole.run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{run} and {whole.run_dir}: the same 24 samples in the same order" in done.stdout
    # a record of the middle is damaged: its step cannot be vouched for
    (path,) = list_files(whole.run_dir / FOLDER)
    content = bytearray(path.read_bytes())
    content[-60] ^= 1
    path.write_bytes(content)
    done = longhaul("data", "verify", run, whole.run_dir, "--json")
    assert done.returncode == 1
    values = json.loads(done.stdout)
    assert values["runs"][1]["missing"] == [[16, 20]]
    assert values["comparison"] | {"settings": {}} == {
        "same_order": True,
        "common": 24,
        "compared": 20,
        "first_difference": None,
        "different": [],
        "settings": {},
    }


def test_a_checkpoint_ahead_of_the_ledger_is_found(tmp_path: Path, shards: Shards) -> None:
    config = validate(tiny(tmp_path / "run", shards, train__steps=4, checkpoint__every=2))
    finish(1, config)
    (path,) = list_files(config.run_dir / FOLDER)
    path.write_bytes(path.read_bytes()[:-44])
    found = verify([config.run_dir])
    assert not found.good
    assert "missing: samples 12 to 15 (step 4)" in sentences(found)
