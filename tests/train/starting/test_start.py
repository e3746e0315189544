"""Ranks that would train different runs are stopped before they do."""

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.train.tiny import Shards, prepare_shards, tiny
from train.settings.config import validate
from train.starting.inputs import open_inputs
from train.starting.start import agree_on

pytestmark = pytest.mark.gloo


def agree(folder: Path, shards: tuple[Shards, ...], seeds: tuple[int, ...]) -> str:
    """Runs on a rank, each with shards and a seed of its own."""
    rank = dist.get_rank()
    config = validate(tiny(folder, shards[rank], seed=seeds[rank]))
    same = validate(tiny(folder, shards[0], seed=seeds[rank]))  # as if its files lay elsewhere
    try:
        agree_on(same, open_inputs(config))
    except ValueError as error:
        return str(error)
    return "agreed"


def test_the_same_configuration_on_all_ranks_is_agreed_on(tmp_path: Path, shards: Shards) -> None:
    assert run_ranks(2, agree, tmp_path, (shards, shards), (3, 3)) == ["agreed"] * 2


def test_another_configuration_on_one_rank_is_an_error_on_all(
    tmp_path: Path, shards: Shards
) -> None:
    first, second = run_ranks(2, agree, tmp_path, (shards, shards), (3, 4))
    assert first == second
    assert first.startswith("rank 1 has another configuration than rank 0 (1 ranks have)")


@pytest.mark.parametrize("side", ["train", "valid"])
def test_other_data_on_one_node_is_an_error_on_all(
    tmp_path: Path, shards: Shards, side: str
) -> None:
    other = shards._replace(**{side: getattr(prepare_shards(tmp_path / "other", seed=1), side)})
    first, second = run_ranks(2, agree, tmp_path / "run", (shards, other), (3, 3))
    assert first == second
    assert first.startswith(f"rank 1 has another data.{side} than rank 0 (1 ranks have)")
