import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data.history import Range, read_history
from data.index import Corpus
from data.ledger import Header, Ledger, Skip, hash_samples, list_files, record_dtype
from data.loader import assemble
from data.streams import Batch, Streams
from tests.data.ledgers import consume, corpus_in


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return corpus_in(tmp_path)


def batch_of(corpus: Corpus, rows: int = 2, first: int = 8) -> Batch:
    streams = Streams(corpus.lengths, seed=5, lanes=4, segment_len=4, segments=3)
    return assemble(corpus, streams, first, rows)


def begin(folder: Path, samples: int = 2) -> Ledger:
    return Ledger(folder, Header(1, 0, 1, 8, samples, samples, {}))


def test_every_layout_and_worker_count_leaves_the_same_history(
    corpus: Corpus, tmp_path: Path
) -> None:
    for name, dp_size, workers, micro_batch in (("a", 1, 0, 1), ("b", 6, 2, 2), ("c", 4, 1, 3)):
        consume(
            corpus,
            tmp_path / name,
            first=0,
            last=5,
            dp_size=dp_size,
            workers=workers,
            micro_batch=micro_batch,
        )
    a, b, c = (read_history(tmp_path / name) for name in "abc")
    assert a.counts.tolist() == b.counts.tolist() == c.counts.tolist() == [1] * 60
    assert a.hashes.tolist() == b.hashes.tolist() == c.hashes.tolist()


def test_ranks_and_workers_may_change_again_and_again(corpus: Corpus, tmp_path: Path) -> None:
    # 4 -> 2 -> 3 -> 6 ranks, each killed some steps after the checkpoint that the next goes on from
    consume(corpus, tmp_path / "a", first=0, last=20)
    consume(corpus, tmp_path / "b", first=0, last=7, dp_size=4, workers=1, torn=2)
    consume(corpus, tmp_path / "b", first=5, last=9, dp_size=2, workers=3, micro_batch=3, torn=1)
    consume(corpus, tmp_path / "b", first=8, last=14, dp_size=3, workers=0, micro_batch=2)
    consume(corpus, tmp_path / "b", first=14, last=20, dp_size=6, workers=2)
    one, other = read_history(tmp_path / "a"), read_history(tmp_path / "b")
    assert other.counts.tolist() == [1] * 240
    assert np.array_equal(one.hashes, other.hashes)
    assert other.redone == (2 * 12 + 2 * 3) + (1 * 12 + 6)
    assert len(other.changed) == 0


def test_an_undone_step_does_not_count(corpus: Corpus, tmp_path: Path) -> None:
    consume(corpus, tmp_path / "run", first=0, last=9)
    consume(corpus, tmp_path / "run", first=4, last=6)  # killed before it came as far
    history = read_history(tmp_path / "run")
    assert history.counts.tolist() == [1] * 72 + [0] * 36
    assert history.extent() == 72


def skip(folder: Path, attempt: int, *lines: str) -> None:
    (folder / f"attempt-{attempt:05d}.skipped").write_text("".join(lines))


def test_samples_passed_over_are_read_and_not_missing(corpus: Corpus, tmp_path: Path) -> None:
    consume(corpus, tmp_path, first=0, last=5)
    line = json.dumps(Skip(24, 48, "rolled back")._asdict()) + "\n"
    skip(tmp_path, 1, line, line[:9])  # a second one that a kill cut short
    history = read_history(tmp_path)
    assert history.passed_over(60) == [Range(24, 48)]
    assert history.passed_over(30) == [Range(24, 30)]
    assert history.missing(60) == history.twice(60) == []


def test_what_a_later_attempt_does_again_is_passed_over_no_more(
    corpus: Corpus, tmp_path: Path
) -> None:
    consume(corpus, tmp_path, first=0, last=5)
    consume(corpus, tmp_path, first=3, last=5)  # killed before the rollback of step 5 was saved
    skip(tmp_path, 1, json.dumps(Skip(24, 60, "rolled back")._asdict()) + "\n")
    assert read_history(tmp_path).passed_over(60) == [Range(24, 36)]
    skip(tmp_path, 2, json.dumps(Skip(48, 60, "skipped")._asdict()) + "\n")
    assert read_history(tmp_path).passed_over(60) == [Range(24, 36), Range(48, 60)]


def test_a_sample_that_is_another_one_when_done_again_is_found(
    corpus: Corpus, tmp_path: Path
) -> None:
    consume(corpus, tmp_path / "run", first=0, last=6)
    consume(corpus, tmp_path / "run", first=4, last=6, seed=6)
    assert set(read_history(tmp_path / "run").changed) <= set(range(48, 72))
    assert len(read_history(tmp_path / "run").changed) > 12


def test_a_lost_file_leaves_holes_and_is_named(corpus: Corpus, tmp_path: Path) -> None:
    consume(corpus, tmp_path / "run", first=0, last=2, dp_size=3)
    list_files(tmp_path / "run")[1].unlink()
    history = read_history(tmp_path / "run")
    assert history.missing(24) == [Range(4, 8), Range(16, 20)]
    assert history.notes == ["attempt 1 ran with 3 data-parallel ranks, and has no file of rank 1"]


def test_what_lies_before_and_after_a_ledger_is_missing(corpus: Corpus, tmp_path: Path) -> None:
    consume(corpus, tmp_path / "run", first=2, last=4)
    history = read_history(tmp_path / "run")
    assert history.missing(48) == [Range(0, 24)]
    assert history.missing(60) == [Range(0, 24), Range(48, 60)]
    assert history.missing(12) == [Range(0, 12)]


def test_a_sample_read_by_two_ranks_came_twice(corpus: Corpus, tmp_path: Path) -> None:
    consume(corpus, tmp_path / "run", first=0, last=2, dp_size=3)
    one, other, _ = list_files(tmp_path / "run")
    line = other.read_bytes().split(b"\n")[0]
    other.write_bytes(line + b"\n" + one.read_bytes().split(b"\n", 1)[1])
    history = read_history(tmp_path / "run")
    assert history.twice(24) == [Range(0, 4), Range(12, 16)]
    assert history.missing(24) == [Range(4, 8), Range(16, 20)]


@pytest.mark.parametrize("cut", [1, 10, record_dtype(12).itemsize - 1])
def test_a_torn_last_record_is_left_out(cut: int, corpus: Corpus, tmp_path: Path) -> None:
    consume(corpus, tmp_path / "run", first=0, last=3)
    (path,) = list_files(tmp_path / "run")
    os.truncate(path, path.stat().st_size - cut)
    history = read_history(tmp_path / "run")
    assert history.counts.tolist() == [1] * 24
    assert "torn record" in history.notes[0]


def test_a_tail_of_zeros_is_torn_as_well(corpus: Corpus, tmp_path: Path) -> None:
    # what a power cut may leave of pages that were never written
    consume(corpus, tmp_path / "run", first=0, last=3)
    (path,) = list_files(tmp_path / "run")
    size = path.stat().st_size
    os.truncate(path, size - 2 * record_dtype(12).itemsize)
    os.truncate(path, size)
    history = read_history(tmp_path / "run")
    assert history.counts.tolist() == [1] * 12
    assert "torn record" in history.notes[0]


def test_a_flipped_bit_in_the_middle_is_named_and_its_step_missing(
    corpus: Corpus, tmp_path: Path
) -> None:
    consume(corpus, tmp_path / "run", first=0, last=3)
    (path,) = list_files(tmp_path / "run")
    content = bytearray(path.read_bytes())
    content[-2 * record_dtype(12).itemsize + 9] ^= 1
    path.write_bytes(content)
    history = read_history(tmp_path / "run")
    assert history.missing(36) == [Range(12, 24)]
    assert "record 1 has another crc32" in history.notes[0]


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no ledger"):
        read_history(tmp_path / "nowhere")


def test_a_record_is_in_the_file_before_its_step_is_trained_on(
    corpus: Corpus, tmp_path: Path
) -> None:
    pid = os.fork()
    if pid == 0:
        for _ in begin(tmp_path / "run").recording([[batch_of(corpus)]]):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert read_history(tmp_path / "run").missing(10) == [Range(0, 8)]


def test_sync_reaches_the_disk(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = begin(tmp_path / "run")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(1))
    ledger.append([batch_of(corpus)])
    assert not synced
    ledger.sync()
    assert synced


def test_a_full_disk_waits_for_the_checkpoint_and_is_raised_there(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = begin(tmp_path / "run")

    def full(descriptor: int, content: bytes, place: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        ledger.append([batch_of(corpus)])
        with pytest.raises(OSError, match="ledger cannot be written: No space left"):
            ledger.sync()
    ledger.sync()  # somebody made room
    assert read_history(tmp_path / "run").counts.tolist() == [1, 1]


def test_what_a_lost_server_had_not_on_disk_is_written_again(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = begin(tmp_path / "run")
    (path,) = list_files(tmp_path / "run")
    ledger.append([batch_of(corpus)])
    ledger.sync()
    there = path.stat().st_size
    ledger.append([batch_of(corpus, first=10)])

    def lose(_: int) -> None:
        os.truncate(path, there)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lose)
        with pytest.raises(OSError, match="Input/output"):
            ledger.sync()
    path.rename(path.with_suffix(".moved"))  # what is open is another file now
    path.with_suffix(".moved").rename(path)
    ledger.append([batch_of(corpus, first=12)])
    ledger.sync()
    assert read_history(tmp_path / "run").counts.tolist() == [1] * 6


@pytest.mark.parametrize("field", ["tokens", "labels", "starts"])
def test_every_part_of_a_sample_is_in_its_hashes(field: str, corpus: Corpus) -> None:
    batch = batch_of(corpus)
    changed = getattr(batch, field).clone()
    changed[1, 2] = changed[1, 2] == 0
    before = list(hash_samples(batch))
    after = list(hash_samples(batch._replace(**{field: changed})))
    assert before[0] == after[0]
    assert (before[1][0] == after[1][0]) == (field != "tokens")
    assert (before[1][1] == after[1][1]) == (field == "tokens")
