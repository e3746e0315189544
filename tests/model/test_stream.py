"""Reading in pieces gives the logits of training, for every memory."""

import pytest
import torch
from torch import Tensor

from model import stream
from model.config import LandmarkMemory, MemoryConfig, WindowMemory
from model.decoder import Decoder
from model.memory.base import named_tensors
from model.stream import Stream
from tests.cases import case
from tests.compare import assert_each, relative
from tests.model.memories import MEMORIES
from tests.model.small import VOCAB, build, config_of

MEMORY = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
INCREMENTAL = {
    name: memory for name, memory in MEMORIES.items() if not isinstance(memory, LandmarkMemory)
}
"""Those whose open segment is not recomputed anyway."""

SEGMENT_LEN, SEGMENTS, LANDMARK = 8, 4, VOCAB - 1


def text(length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, LANDMARK, (batch, length), generator=generator)


def at_once(model: Decoder, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of the training computation: whole segments in one call, padded."""
    memory, block = model.config.memory, 0
    if isinstance(memory, LandmarkMemory):
        block = memory.block
        closed = torch.full((*tokens.shape[:1], tokens.shape[1] // (block - 1), block), LANDMARK)
        closed[..., :-1] = tokens.unflatten(1, (-1, block - 1))
        tokens = closed.flatten(1)
    segments = -(-tokens.shape[1] // SEGMENT_LEN)
    padded = torch.zeros(len(tokens), segments * SEGMENT_LEN, dtype=torch.int64)
    padded[:, : tokens.shape[1]] = tokens
    starts = torch.zeros(len(tokens), segments, dtype=torch.bool)
    logits, _ = model(padded.unflatten(1, (segments, -1)), starts)
    logits = logits.flatten(1, 2)[:, : tokens.shape[1]]
    if block:
        logits = logits.unflatten(1, (-1, block))[:, :, :-1].flatten(1, 2)
    return logits.detach()


def length_of(memory: MemoryConfig, segments: int) -> int:
    """Tokens of text in so many segments."""
    block = memory.block if isinstance(memory, LandmarkMemory) else None
    return segments * SEGMENT_LEN * (block - 1) // block if block else segments * SEGMENT_LEN


@MEMORY
def test_pieces_of_any_length_give_the_logits_of_training(memory: MemoryConfig) -> None:
    model = build(config_of(memory)).eval()
    tokens = text(length_of(memory, SEGMENTS))
    expected = at_once(model, tokens)
    for pieces in [(1,), (3, 1, 1), (8, 5), (32,), (17, 2)]:
        reader = Stream(model, SEGMENT_LEN, batch=2, segments_per_call=2)
        found, first = [], 0
        while first < tokens.shape[1]:
            for piece in pieces:
                part = tokens[:, first : first + piece]
                first += piece
                if part.shape[1]:
                    found.append(reader.read_all(part))
        with case("pieces of", *pieces):
            assert relative(torch.cat(found, 1), expected) < 1e-10
            assert reader.num_tokens == tokens.shape[1]


@MEMORY
def test_only_the_last_logits_are_computed_where_no_others_are_wanted(memory: MemoryConfig) -> None:
    model = build(config_of(memory)).eval()
    tokens = text(length_of(memory, 2) + 3)
    every = Stream(model, SEGMENT_LEN, batch=2).read_all(tokens)
    reader = Stream(model, SEGMENT_LEN, batch=2)
    assert relative(reader.read(tokens[:, :-3]), every[:, -4]) < 1e-12
    assert relative(reader.read(tokens[:, -3:]), every[:, -1]) < 1e-12


@pytest.mark.parametrize("memory", INCREMENTAL.values(), ids=INCREMENTAL.keys())
def test_an_open_segment_read_on_is_the_one_read_whole(
    memory: MemoryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Incremental against its slow twin, the state after it too."""
    model, tokens = build(config_of(memory)).eval(), text(19)
    fast = Stream(model, SEGMENT_LEN, batch=2)
    logits = torch.cat([fast.read_all(tokens[:, i : i + 1]) for i in range(19)], 1)
    monkeypatch.setattr(stream, "Incremental", stream.Recomputed)
    slow = Stream(model, SEGMENT_LEN, batch=2)
    assert relative(logits, slow.read_all(tokens)) < 1e-10
    found, expected = (named_tensors(s.carried, "") for s in (fast, slow))
    assert_each(found, expected, 1e-10)


def test_a_landmark_is_the_last_id() -> None:
    assert config_of(LandmarkMemory(block=2, window=1)).landmark == LANDMARK
    assert config_of(WindowMemory(1)).landmark is None
