"""A packed document is read as it would be alone: losses, gradients, and what it cannot see."""

import pytest
import torch

from model.config import ComputeConfig, LandmarkMemory, MemoryConfig
from tests.compare import assert_each
from tests.model.memories import IN_A_LAYER, IN_TURN, MEMORIES
from tests.model.packed import packed_batch, read_alone, read_packed
from tests.model.small import VOCAB, build, config_of

PACKS = {
    name: memory for name, memory in IN_A_LAYER.items() if not isinstance(memory, LandmarkMemory)
}
MEMORY = pytest.mark.parametrize("memory", PACKS.values(), ids=PACKS.keys())


@MEMORY
def test_packed_documents_are_read_as_each_alone(memory: MemoryConfig) -> None:
    model, batch = build(config_of(memory)), packed_batch()
    expected = read_alone(model, batch)
    found = read_packed(model, batch)
    assert len(found) == len(expected) > 12
    assert_each(found, expected, 1e-10)


@MEMORY
def test_a_changed_token_leaves_every_other_document_bit_identical(memory: MemoryConfig) -> None:
    model, batch = build(config_of(memory), torch.float32), packed_batch()

    def logits() -> torch.Tensor:
        with torch.no_grad():
            read, _ = model(batch.tokens, batch.starts, documents=batch.documents)
        return read[..., :VOCAB].flatten(1, 2)

    text = torch.zeros(batch.documents.flatten(1).shape, dtype=torch.bool)
    for lane, begin, length in batch.runs:
        text[lane, begin : begin + length] = True
    before = logits()
    for lane, begin, length in batch.runs:
        place = begin + length // 2
        tokens = batch.tokens[lane].view(-1)
        tokens[place] = (tokens[place] + 1) % VOCAB
        changed = (logits() != before).any(-1) & text
        before = logits()
        assert changed[lane, place]
        changed[lane, place : begin + length] = False
        assert not changed.any()


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
def test_recomputation_packs_alike(checkpointing: str) -> None:
    memory, batch = PACKS["window-fam-infini"], packed_batch()
    expected = read_packed(build(config_of(memory)), batch)
    model = build(config_of(memory), compute=ComputeConfig(checkpointing))
    assert_each(read_packed(model, batch), expected, 1e-12)


@pytest.mark.parametrize("name", [*IN_TURN, "landmark"])
def test_memories_that_read_whole_segments_refuse_packed_ones(name: str) -> None:
    model, batch = build(config_of(MEMORIES[name])), packed_batch()
    with pytest.raises(ValueError, match="packed for none, window, fam, infini, abc and cmab"):
        model(batch.tokens, batch.starts, documents=batch.documents)


def test_documents_out_of_order_are_refused() -> None:
    model, batch = build(config_of(PACKS["none"])), packed_batch()
    batch.documents[0, 1, 7] = 0
    with pytest.raises(ValueError, match="documents must be 0 at the first token"):
        model(batch.tokens, batch.starts, documents=batch.documents)


def test_what_several_documents_leave_is_nobodys_past() -> None:
    model, batch = build(config_of(PACKS["none"])), packed_batch()
    batch.starts[0, 2] = False
    with pytest.raises(ValueError, match="followed by one that starts none; set starts"):
        model(batch.tokens, batch.starts, documents=batch.documents)


def test_segments_of_one_document_each_are_those_that_are_not_packed_bit_for_bit() -> None:
    model, batch = build(config_of(PACKS["fam-norm-window-1-current"])), packed_batch()
    with torch.no_grad():
        plain, _ = model(batch.tokens, batch.starts)
        packed, _ = model(batch.tokens, batch.starts, documents=torch.zeros_like(batch.documents))
    assert torch.equal(plain, packed)
