"""`longhaul generate` on several ranks: the text of one process, and everyone ends together."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from model.config import NoMemory
from model.sampling import Sampling
from parallel.ring import choose_exchange
from tests.model.small import build, config_of
from tests.ranks import run_ranks
from tests.train.runs import ROOT, longhaul
from tests.train.runs import write as write_yaml
from tests.train.tiny import Shards, tiny, write_permuted
from train.agree import SomeRankFailed, of_first, together
from train.generation.generate import run
from train.generation.ranks import choose_error, follow, leading
from train.generation.sharded import read_prompt
from train.generation.writing import Wanted

SEGMENT_LEN = 64
TEXT = "words and more words, and then some"
GREEDY = Wanted(12, Sampling(temperature=0))
SAMPLED = Wanted(12, Sampling(temperature=0.8, top_p=0.95, seed=5))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Shards) -> dict[str, Path]:
    """A finished run of two steps without memory, and one with."""
    found = {}
    for name in ("none", "fam"):
        folder: Path = tmp_path_factory.mktemp(name)
        raw = tiny(folder / "run", shards, train__steps=2, train__warmup_steps=1)
        raw["data"] |= {"segment_len": SEGMENT_LEN, "sample_len": SEGMENT_LEN}
        if name == "none":
            raw["model"]["memory"] = {"name": "none"}
        ended = longhaul("pretrain", write_yaml(folder, raw))
        assert ended.returncode == 0, ended.stderr
        found[name] = folder / "run"
    return found


class Shown(NamedTuple):
    """What a rank printed, and the error that it ended with."""

    out: str
    err: str
    error: str


def generated(checkpoint: Path, prompt: Path, wanted: Wanted, options: dict[str, Any]) -> Shown:
    """Runs on a rank."""
    error = ""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            assert run(checkpoint, str(prompt), wanted, **options) == 0
        except ValueError as caught:
            error = f"{type(caught).__name__}: {caught}"
    return Shown(out.getvalue(), err.getvalue(), error)


def on_ranks(
    size: int, checkpoint: Path, folder: Path, text: str, wanted: Wanted, **options: object
) -> list[Shown]:
    prompt = folder / "prompt.txt"
    prompt.write_text(text)
    found: list[Shown] = run_ranks(size, generated, checkpoint, prompt, wanted, options)
    return found


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("size", "text", "wanted", "options"),
    [
        (2, TEXT, GREEDY, {}),
        (3, TEXT, SAMPLED, {}),
        (2, "x", SAMPLED, {}),
        (2, TEXT * 20, GREEDY, {"context": "truncate"}),
        (2, TEXT, Wanted(0), {}),
    ],
)
def test_ranks_write_what_one_process_writes(
    runs: dict[str, Path],
    tmp_path: Path,
    size: int,
    text: str,
    wanted: Wanted,
    options: dict[str, object],
) -> None:
    (alone,) = on_ranks(1, runs["none"], tmp_path, text, wanted, **options)
    first, *others = on_ranks(size, runs["none"], tmp_path, text, wanted, **options)
    assert alone.out.strip() or not wanted.max_tokens
    assert (first.out, first.error) == (alone.out, "")
    assert others == [Shown("", "", "")] * (size - 1)
    count = min(len(text), SEGMENT_LEN - wanted.max_tokens)
    assert f"read {count} tokens in " in first.err


@pytest.mark.gloo
def test_a_stop_text_ends_all_ranks(runs: dict[str, Path], tmp_path: Path) -> None:
    (whole,) = on_ranks(1, runs["none"], tmp_path, TEXT, SAMPLED)
    stop = Wanted(SAMPLED.max_tokens, SAMPLED.sampling, (whole.out[3:5],))
    first, other = on_ranks(2, runs["none"], tmp_path, TEXT, stop)
    assert first.out == whole.out[: whole.out.index(stop.stop[0])] + "\n"
    assert other == Shown("", "", "")


@pytest.mark.gloo
def test_what_a_rank_holds_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    first, _ = on_ranks(2, runs["none"], tmp_path, TEXT, GREEDY)
    # 35 tokens, of which a rank holds 18; k and v, 2 layers, 2 heads of 8, float32
    assert f"keys: {18 * 2 * 2 * 2 * 8 * 4:,} bytes a rank, 2 ranks" in first.err


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("fam", "x", {}, "model.memory=fam reads .* over 2 ranks; run it in one process"),
        ("none", "x", {"context": "homer"}, "--context homer merges the prompt on one device"),
        ("none", "", {}, "prompt.txt is empty; a prompt needs at least one token"),
        ("none", TEXT * 2, {}, "has 70 tokens, and a model without memory sees 64"),
        ("none", "x", {"tokenizer": Path("missing")}, "missing"),
        ("none", "x", {"changes": ["beta=8"]}, "model.memory.beta: unknown key"),
    ],
)
def test_what_rank_0_refuses_ends_all_ranks(
    runs: dict[str, Path], tmp_path: Path, name: str, text: str, options: dict, message: str
) -> None:
    first, other = on_ranks(2, runs[name], tmp_path, text, GREEDY, **options)
    assert first.error.startswith("ValueError: ") or first.error.startswith("ConfigError: ")
    assert re.search(message, first.error) and (first.out, first.err) == ("", "")
    assert other == Shown("", "", "")


@pytest.mark.gloo
def test_another_tokenizer_of_as_many_ids_ends_all_ranks(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    other = write_permuted(tmp_path)
    first, second = on_ranks(2, runs["none"], tmp_path, "x", GREEDY, tokenizer=other)
    assert first.error.startswith(f"ValueError: {other} is another tokenizer (sha256 ")
    assert (first.out, first.err) == ("", "") and second == Shown("", "", "")


def failing(error: Exception) -> tuple[str, str]:
    """Runs on a rank: rank 1 fails where all work, and where only rank 0 is asked."""

    def work() -> int:
        if dist.get_rank() == 1:
            raise error
        return dist.get_rank()

    with pytest.raises(SomeRankFailed) as caught:
        together(work)
    assert of_first(work) == 0
    ended = choose_error(caught.value)
    return type(ended).__name__, str(ended)


@pytest.mark.gloo
def test_an_error_of_one_rank_is_said_by_rank_0() -> None:
    said, silent = ("ValueError", "rank 1: no such file"), ("NoneType", "None")
    assert run_ranks(3, failing, ValueError("no such file")) == [said, silent, silent]
    # What nobody expected keeps its traceback.
    own = ("RuntimeError", "no such file")
    assert run_ranks(3, failing, RuntimeError("no such file")) == [said, own, silent]


def broken() -> int:
    """Runs on a rank: rank 0 loses its output after a step."""
    tokens = torch.arange(7)
    ranks = choose_exchange("ring", dist.group.WORLD)
    sharded = read_prompt(build(config_of(NoMemory())), tokens, ranks, SEGMENT_LEN)
    if dist.get_rank():
        follow(sharded)
    else:
        with pytest.raises(BrokenPipeError), leading(sharded) as step:
            step(3)
            raise BrokenPipeError
    return sharded.num_tokens


@pytest.mark.gloo
def test_an_error_between_steps_ends_all_ranks() -> None:
    assert run_ranks(2, broken) == [8, 8]


def torchrun(*arguments: object, text: str) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node 2 longhaul generate` with a text on standard input."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    line = [sys.executable, "-c", "from train.cli import main; main()", "generate"]
    return subprocess.run(
        [sys.executable, *launch, *line, *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=300,  # never waited for in a good run
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.gloo
@pytest.mark.slow
def test_torchrun_reads_standard_input_once(runs: dict[str, Path], tmp_path: Path) -> None:
    (alone,) = on_ranks(1, runs["none"], tmp_path, TEXT, GREEDY)
    ended = torchrun(runs["none"], "--max-tokens", 12, "--temperature", 0, text=TEXT)
    assert (ended.returncode, ended.stdout) == (0, alone.out), ended.stderr
    assert "bytes a rank, 2 ranks" in ended.stderr and "arning" not in ended.stderr


@pytest.mark.gloo
def test_torchrun_shows_one_message_for_all_ranks(runs: dict[str, Path]) -> None:
    ended = torchrun(runs["none"], "--max-tokens", 12, text="")
    assert ended.returncode != 0 and ended.stdout == ""
    message = "standard input is empty; a prompt needs at least one token"
    assert ended.stderr.splitlines().count(message) == 1  # torchrun's own summary is indented
    assert "[rank 1]" not in ended.stderr
