"""The last lines of a failed run: what happened, and what to do."""

import errno
from functools import partial

import pytest
import torch

from train.planning import load_cluster, plan
from train.settings.config import load
from train.watch.last_words import is_echo, last_words, remedy

PEER = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")


def test_an_error_that_only_follows_another_ranks_end_says_so() -> None:
    assert is_echo(PEER) and "another rank" in remedy(PEER)
    assert not is_echo(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_echo(ConnectionResetError("Connection reset by peer"))  # of a data server, say


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "train.checkpointing: block"),
        (MemoryError(), "train.micro_batch"),
        (OSError(errno.ENOSPC, "No space left on device"), "free disk space"),
        (OSError(errno.EIO, "Input/output error"), "file system"),
        (FloatingPointError("3 steps in a row"), "follow the message"),
        (KeyError("x"), "traceback above"),
    ],
)
def test_each_kind_of_error_has_its_advice(error: Exception, advice: str) -> None:
    assert advice in remedy(error)


def test_where_memory_ran_out_the_plans_largest_parts_are_named() -> None:
    config = load("configs/pretrain_8b.yaml", ["train.checkpointing=none"], world_size=64)
    largest = plan(config, load_cluster("h100"), 8, 8).memory.largest()
    advice = remedy(torch.OutOfMemoryError("CUDA out of memory"), largest)
    assert "the plan's largest parts are layers 42." in advice
    assert advice.endswith("layers: train.checkpointing=block, raise parallel.cp, lower"
                           " train.micro_batch or bptt_len")  # fmt: skip


def test_the_last_lines_name_rank_node_error_checkpoint_and_command() -> None:
    words = partial(last_words, run="books", node="n7", command="sbatch x.sh")
    text = words(ValueError("bad\nmore"), rank=3, checkpoint="runs/books/step-9")
    assert text.splitlines()[0] == "[rank 3 on n7] run books failed: ValueError: bad"
    last = "  checkpoint: runs/books/step-9; it is gone on from by: sbatch x.sh"
    assert text.splitlines()[-1] == last
    assert words(PEER, rank=0, checkpoint=None).endswith("checkpoint: none yet")
