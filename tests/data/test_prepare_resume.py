import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import sources
from data.index import Corpus
from data.prepare import prepare
from data.tokenizer import ByteTokenizer, Tokenizer, TokenizerTraining
from tests.data.corpora import snapshot
from tests.data.test_prepare import story

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from data.prepare import prepare
from data.tokenizer import ByteTokenizer
inputs, output, workers = sys.argv[1:]
prepare([inputs], output, tokenizer=ByteTokenizer(), valid_fraction=0.1,
        shard_tokens=20000, workers=int(workers), progress=False)
"""


# A durable step of the fixture `small` with several shards behind it and before it.
STOP = 45


class Killed(BaseException):
    """Like kill -9: nothing in the code under test may catch it and go on."""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 documents and 3 empty ones, in blocks of a few documents."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [story(n, 30) for n in range(24)]
    texts[5:5] = ["", " "]
    texts[15:15] = [""]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sources, "BLOCK_BYTES", 600)
    return folder


def run(inputs: Path, output: Path, tokenizer: Tokenizer | TokenizerTraining) -> int:
    return prepare(
        [inputs],
        output,
        tokenizer=tokenizer,
        valid_fraction=0.3,
        shard_tokens=700,
        workers=1,
        progress=False,
    ).empty_documents


def count_syncs(monkeypatch: pytest.MonkeyPatch, die_at: int | None) -> list[int]:
    """Count os.fsync, and die there: it stands before and behind every durable step."""
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == die_at:
            raise Killed

    monkeypatch.setattr(os, "fsync", fsync)
    return calls


def stopped(small: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        count_syncs(patch, STOP)
        with pytest.raises(Killed):
            run(small, output, ByteTokenizer())


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TokenizerTraining(300)])
def test_dying_at_any_durable_step_and_continuing_gives_the_same_bytes(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Tokenizer | TokenizerTraining,
) -> None:
    with monkeypatch.context() as patch:
        calls = count_syncs(patch, None)
        run(small, tmp_path / "whole", tokenizer)
    steps = len(calls)
    assert steps > 30
    expected = snapshot(tmp_path / "whole")
    for step in range(1, steps + 1):
        output = tmp_path / f"killed-{step}"
        with monkeypatch.context() as patch:
            count_syncs(patch, step)
            with pytest.raises(Killed):
                run(small, output, tokenizer)
        assert run(small, output, tokenizer) == 3
        assert snapshot(output) == expected, f"killed at step {step}"


def test_finished_shards_are_not_tokenised_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    real = ByteTokenizer.encode

    def encode(self: ByteTokenizer, text: str) -> object:
        encoded.append(text)
        return real(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", encode)
    stopped(small, tmp_path / "out", monkeypatch)
    shards = (tmp_path / "out/.prepare/shards.jsonl").read_text().splitlines()
    finished = sum(json.loads(line)["shard"]["documents"] for line in shards)
    encoded.clear()
    run(small, tmp_path / "out", ByteTokenizer())
    assert finished > 5 and len(encoded) == 24 - finished


def test_half_a_line_in_the_journal_is_forgotten(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small, tmp_path / "whole", ByteTokenizer())
    stopped(small, tmp_path / "out", monkeypatch)
    with open(tmp_path / "out/.prepare/shards.jsonl", "a") as stream:
        stream.write('{"side": "train", "shar')
    run(small, tmp_path / "out", ByteTokenizer())
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_stopped_prepare_refuses_other_settings(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(small, tmp_path / "out", monkeypatch)
    with pytest.raises(ValueError, match="tokenizer .* there, .* now"):
        run(small, tmp_path / "out", TokenizerTraining(300))


def test_a_stopped_prepare_that_lost_a_finished_shard_says_so(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(small, tmp_path / "out", monkeypatch)
    (tmp_path / "out/train/shard-000000.tar").unlink()
    with pytest.raises(ValueError, match="cannot be continued: .*shard-000000.tar is missing"):
        run(small, tmp_path / "out", ByteTokenizer())


def test_a_stopped_prepare_is_not_a_corpus(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(small, tmp_path / "out", monkeypatch)
    with pytest.raises(ValueError, match="holds no finished shards; run `longhaul prepare`"):
        Corpus.open(tmp_path / "out/train")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"text": story(n, 400)}) for n in range(3000)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder


def start(inputs: Path, output: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(inputs), str(output), str(workers)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def wait_for_shards(process: subprocess.Popen[bytes], output: Path, count: int) -> None:
    while process.poll() is None and len(list(output.glob("train/*.tar"))) < count:
        time.sleep(0.002)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_in_the_middle_and_continue_gives_identical_bytes(
    large: Path, tmp_path: Path, workers: int
) -> None:
    assert start(large, tmp_path / "whole", 1).wait() == 0
    output = tmp_path / "killed"
    moments = random.Random(workers)
    kills = 0
    for _ in range(3):
        process = start(large, output, workers)
        done = len(list(output.glob("train/*.tar")))
        wait_for_shards(process, output, done + moments.randint(2, 8))
        if process.poll() is None:
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 2 and not (output / "prepare.json").exists()
    assert start(large, output, workers).wait() == 0
    assert snapshot(output) == snapshot(tmp_path / "whole")


def test_kill_9_leaves_no_worker_behind(large: Path, tmp_path: Path) -> None:
    process = start(large, tmp_path / "out", 2)
    wait_for_shards(process, tmp_path / "out", 1)
    workers = children_of(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(workers) >= 2 and not any(map(is_running, workers))
