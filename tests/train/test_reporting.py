"""What a run tells of itself."""

import torch

from model.memory.block_store import append, empty_store
from train.loop import TrainState
from train.reporting import memory_norms


def test_norms_of_memory_are_of_what_it_holds() -> None:
    """Not of the room behind the end of a store, which is whatever was there."""
    k, v = torch.full((1, 4, 1, 8), 2.0), torch.full((1, 4, 1, 8), 3.0)
    store = append(empty_store(1, 1, 4, k), k, v)
    for room in (store.keys, store.values, store.landmarks.transpose(1, 2)):
        assert room.shape[1] > 1
        room[:, 1:] = torch.inf
    norms = memory_norms(TrainState(memory={0: [store]}))
    assert sorted(norms.values()) == [2.0, 2.0, 3.0]
