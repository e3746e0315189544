"""Questions read in a layout: the answers and logits of one process, on every rank."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from data.tokenizer import ByteTokenizer
from model.memory.base import State
from tests.ranks import run_ranks
from tests.train.evaluation.test_questions import needles
from tests.train.test_every_memory import MEMORIES
from tests.train.tiny import Shards, build_tiny, tiny
from train.evaluation.answers import Answered, DecoderReader, Reader, measure
from train.evaluation.layout_reader import LayoutReader
from train.reading.landmarks import choose_reading
from train.settings.config import validate

pytestmark = pytest.mark.gloo

S = 48
SIZE = 180 + 50 + 2 * len(" The code is 1000.") - 1
"""Tokens of a prompt of `needles`."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "cp": {"parallel__cp": 2},
    "tp": {"parallel__tp": 2},
    "dp": {"parallel__zero": 3},
}


class Recorded:
    """A reader that keeps what another one gave."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.found: list[Tensor] = []

    def read(self, tokens: Tensor, state: State | None) -> State:
        return self.reader.read(tokens, state)

    def logits(self, tokens: Tensor, state: State | None, wanted: Tensor) -> Tensor:
        self.found.append(self.reader.logits(tokens, state, wanted))
        return self.found[-1]


class Found(NamedTuple):
    """What a rank found."""

    answers: list[Answered]
    logits: list[Tensor]
    calls: int  # of the model


def answer(raw: dict[str, Any], *, layout: bool) -> Found:
    """Runs on a rank."""
    config = validate(raw)
    built, mesh, _ = build_tiny(config)
    calls: list[int] = []
    reader = Recorded(DecoderReader(built.model, step=5))
    if layout:
        reader.reader = LayoutReader(built, mesh, step=5, check_stop=lambda: calls.append(1))
    reading = choose_reading(config, built.model.config.vocab_size)
    answers = measure(
        reader,
        needles(3, before=180, after=50),  # an odd number: no multiple of two ranks
        ByteTokenizer(),
        segment_len=reading.segment_len,
        prepare_batch=reading.prepare_tokens,
    )
    return Found(answers, reader.found, len(calls))


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in ("fam", "infini") for layout in LAYOUTS]
    + [("hmt", "tp"), ("landmark", "cp"), ("none", "cp")],
)
def test_every_rank_finds_what_one_process_finds(
    name: str, layout: str, tmp_path: Path, shards: Shards
) -> None:
    sizes = {
        "data__segment_len": S,
        "data__sample_len": 2 * S,
        "model__memory": MEMORIES[name],
        "model__init_std": 0.2,  # large, so that the past changes the logits
        "train__micro_batch": 2,  # hmt's rows scatter by twos
    }
    raw = tiny(tmp_path, shards, **sizes)
    (alone,) = run_ranks(1, lambda: answer(raw, layout=False))
    raw = tiny(tmp_path, shards, **sizes, **LAYOUTS[layout])
    for rank in run_ranks(2, lambda: answer(raw, layout=True)):
        assert rank.answers == alone.answers
        assert len(rank.logits) == len(alone.logits) == 3
        for mine, expected in zip(rank.logits, alone.logits, strict=True):
            assert expected.shape[1] == 257 + (name == "landmark")
            # float32, sums in another order (the design's contract 1)
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        text = S * 3 // 4 if name == "landmark" else S
        segments = -(-SIZE // text)
        assert rank.calls == segments - 1 + 3
    if name != "none":
        on, off, shuffled = alone.logits
        assert (on - off).abs().max() > 1e-3 < (on - shuffled).abs().max()


def test_rows_that_scatter_unevenly_are_filled_up(tmp_path: Path, shards: Shards) -> None:
    # 3 streams of 33 rows over two ranks: one more stream, which nobody hears of
    sizes = {
        "data__segment_len": 33,
        "data__sample_len": 66,
        "parallel__layout": "contiguous",
        "model__memory": MEMORIES["fam"],
    }
    raw = tiny(tmp_path, shards, **sizes)
    (alone,) = run_ranks(1, lambda: answer(raw, layout=False))
    raw = tiny(tmp_path, shards, **sizes, **LAYOUTS["tp"])
    for rank in run_ranks(2, lambda: answer(raw, layout=True)):
        assert rank.answers == alone.answers
        for mine, expected in zip(rank.logits, alone.logits, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
