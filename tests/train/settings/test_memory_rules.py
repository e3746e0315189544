"""What a memory's fields must satisfy together with others: whole messages, and the limits."""

from typing import Any

import pytest

from tests.train.runs import problems, small
from train.settings.config import validate

SP = {"parallel__tp": 4, "model__num_kv_heads": 4}


def memory(name: str, **keys: object) -> dict[str, Any]:
    """Return the change that puts a memory into the small configuration: 4 segments of 64."""
    return {"model__memory": {"name": name, **keys}}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            memory("landmark", block=48),
            "model.memory.block: 48 does not divide data.segment_len = 64 (a segment is whole"
            " blocks); use 32 or 64, or data.segment_len 48 or 96",
        ),
        (
            memory("landmark", block=32) | {"parallel__cp": 2},
            "model.memory.block: 32 does not divide data.segment_len / (2 * parallel.cp) = 64 / 4"
            " = 16 (zigzag: a rank holds whole blocks); use 16, or data.segment_len 128",
        ),
        (
            memory("landmark", block=64) | {"parallel__cp": 2, "parallel__layout": "contiguous"},
            "model.memory.block: 64 does not divide data.segment_len / parallel.cp = 64 / 2 = 32"
            " (contiguous: a rank holds whole blocks); use 32, or data.segment_len 128",
        ),
        (
            memory("landmark", block=2) | {"parallel__cp": 64, "parallel__layout": "contiguous"},
            "model.memory.block: 2 does not divide data.segment_len / parallel.cp = 64 / 64 = 1"
            " (contiguous: a rank holds whole blocks); use data.segment_len 128",
        ),
        (
            memory("landmark", block=16, retrieve=3) | {"parallel__cp": 2},
            "model.memory.retrieve: 3 blocks are read from whole segments, but parallel.cp = 2"
            " ranks hold a part of each; use parallel.cp=1, or retrieve 0 for training",
        ),
        (
            memory("landmark", retrieve=3, granularity="heads") | {"parallel__tp": 2},
            "model.memory.granularity: heads chooses blocks over all heads, but parallel.tp = 2"
            " ranks hold a part of them; use token_and_head or tokens, or parallel.tp=1",
        ),
        (
            memory("landmark", layers="last"),
            "model.memory.layers: last lets the top layer look beyond its segment, and window ="
            " retrieve = 0 leave it nothing to read; set one of them, or use all",
        ),
        (
            memory("rmt", slots=5) | SP,
            "model.memory.slots: 5 rows before a segment and 5 behind it do not split over"
            " parallel.tp = 4 (sequence parallelism); use 4 or 6, or set"
            " parallel.sequence_parallel=false",
        ),
        (
            memory("armt", slots=6) | SP,
            "model.memory.slots: 6 is not a multiple of parallel.tp (sequence parallelism) = 4;"
            " use 4 or 8, or set parallel.sequence_parallel=false",
        ),
        (
            memory("hmt") | SP | {"train__batch_size": 8, "train__micro_batch": 2},
            "train.micro_batch: 2 is not a multiple of parallel.tp (sequence parallelism scatters"
            " hmt's rows, of each stream 35 and 32) = 4; use 4, or set"
            " parallel.sequence_parallel=false",
        ),
        (
            # with all four segments in a call the rows would split
            memory("rmt", slots=8)
            | {
                "parallel__tp": 2,
                "parallel__cp": 2,
                "parallel__layout": "contiguous",
                "data__segment_len": 62,
                "data__sample_len": 248,
            },
            "parallel.sequence_parallel: a call's rows, micro_batch * segment_len / cp = 1 * 62 /"
            " 2 = 31, do not split over parallel.tp = 2; use data.segment_len 60 or 64 or set"
            " parallel.sequence_parallel=false",
        ),
        (
            memory("hmt", sensory=65),
            "model.memory.sensory: 65 is more than data.segment_len = 64, and only the segment"
            " before is read again; use at most 64",
        ),
        (
            memory("hmt", bank=3),
            "model.memory.bank: 3 memories are fewer than a sample has segments, sample_len /"
            " segment_len = 256 / 64 = 4, so training would search what has left the bank; use at"
            " least 4, or a shorter data.sample_len",
        ),
        (
            memory("hmt")
            | {
                "parallel__layout": "contiguous",
                "data__segment_len": 65,
                "data__sample_len": 65,
            },
            "data.segment_len: 65 is odd, and hmt summarises the first half of a segment; use 64"
            " or 66",
        ),
        (
            memory("hmt") | {"parallel__layout": "contiguous", "parallel__cp": 2},
            "parallel.layout: contiguous puts the first half of a segment, which hmt summarises,"
            " on half of the parallel.cp = 2 ranks; use zigzag",
        ),
        (
            memory("hmt")
            | {"train__checkpointing": "block", "train__ffn_chunk": 32, "parallel__zero": 3},
            "train.checkpointing: block with train.ffn_chunk = 32 recomputes inside a"
            " recomputation, for which parallel.zero = 3 has freed hmt's weights already; use"
            " selective, leave ffn_chunk out, or use parallel.zero=2",
        ),
        (
            memory("rmt") | {"train__wavefront": True},
            "train.wavefront: true is for armt, whose layers hold all that is carried, and no other"
            " memory; leave it out",
        ),
        (
            memory("armt") | {"train__wavefront": True, "parallel__zero": 3},
            "train.wavefront: true stacks the whole weights of all layers, which parallel.zero = 3"
            " cuts; use tp=1 and zero=1 or 2, or leave it out",
        ),
        (
            memory("armt") | {"train__wavefront": True, "model__lora": {"rank": 4}},
            "train.wavefront: true stacks the layers' own maps, not model.lora's beside them;"
            " leave one of them out",
        ),
        (
            memory("armt") | {"train__wavefront": True, "train__ffn_chunk": 32},
            "train.wavefront: true hands a block the rows of many layers at once, and"
            " train.ffn_chunk = 32 would cut across them; use one of the two",
        ),
        (
            {"model__memory": []},
            "model.memory: []: nothing is named; use none",
        ),
        (
            {"model__memory": ["none", "fam"]},
            "model.memory: ['none', 'fam']: none joins no other memory; leave it out",
        ),
        (
            {"model__memory": ["window", {"name": "abc", "window": 1}]},
            "model.memory: ['window', 'abc']: more than one sets a window; set it once, by"
            " window.segments",
        ),
        (
            {"model__memory": ["infini", "landmark"]},
            "model.memory: ['infini', 'landmark']: landmark gates every past key itself, and other"
            " memories' keys have no landmark; name landmark alone, or with window",
        ),
        (
            {"model__memory": ["window", {"name": "fam", "slots": 65}]},
            "model.memory.fam.slots: 65 is more than data.segment_len = 64 (slots take the last"
            " positions of a segment); use at most 64",
        ),
    ],
)
def test_a_broken_rule_says_value_limit_and_remedy(changes: dict[str, Any], line: str) -> None:
    assert problems(small(**changes)) == (line,)


@pytest.mark.parametrize(
    "changes",
    [
        memory("landmark", block=64),
        memory("landmark", block=16) | {"parallel__cp": 2},
        memory("landmark", block=32) | {"parallel__cp": 2, "parallel__layout": "contiguous"},
        memory("landmark", granularity="heads") | {"parallel__tp": 2},
        memory("landmark", retrieve=3, granularity="heads"),
        memory("rmt", slots=6) | SP,
        memory("rmt", slots=5) | SP | {"parallel__sequence_parallel": False},
        memory("armt", slots=8) | SP,
        memory("hmt") | SP | {"train__batch_size": 8, "train__micro_batch": 4},
        memory("hmt") | SP | {"parallel__sequence_parallel": False},
        memory("hmt", sensory=64, bank=4) | {"parallel__cp": 2},
        memory("hmt") | {"parallel__layout": "contiguous"},
        memory("hmt") | {"train__checkpointing": "block", "train__ffn_chunk": 32},
        memory("hmt") | {"train__checkpointing": "block", "parallel__zero": 3},
        memory("armt") | {"train__wavefront": True, "parallel__zero": 2, "parallel__cp": 2},
        memory("abc", slots=500) | SP,
        memory("cmab", latents=5) | SP,
        memory("infini") | SP | {"parallel__cp": 2},
        {"model__memory": ["window", "rmt"]},
        {"model__memory": ["window", "fam", "infini", "abc", "cmab"]},
        {"model__memory": ["window"]},
    ],
)
def test_the_limit_itself_is_valid(changes: dict[str, Any]) -> None:
    validate(small(**changes))
