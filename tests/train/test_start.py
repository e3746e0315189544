"""Ranks that would train different runs are stopped before they do."""

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.train.tiny import Shards, tiny
from train.settings.config import validate
from train.starting.start import agree_on

pytestmark = pytest.mark.gloo


def agree(folder: Path, shards: Shards, seeds: tuple[int, ...]) -> str:
    try:
        agree_on(validate(tiny(folder, shards, seed=seeds[dist.get_rank()])))
    except ValueError as error:
        return str(error)
    return "agreed"


def test_the_same_configuration_on_all_ranks_is_agreed_on(tmp_path: Path, shards: Shards) -> None:
    assert run_ranks(2, agree, tmp_path, shards, (3, 3)) == ["agreed"] * 2


def test_another_configuration_on_one_rank_is_an_error_on_all(
    tmp_path: Path, shards: Shards
) -> None:
    first, second = run_ranks(2, agree, tmp_path, shards, (3, 4))
    assert first == second
    assert first.startswith("rank 1 has another configuration than rank 0 (1 ranks have)")
