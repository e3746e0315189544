"""Places of ranks and the groups they talk in."""

import os
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Mesh, build_mesh, place, start_processes, why_on_cpu
from tests.ranks import run_ranks

SHAPES = [(1, 1, 2), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1)]


@pytest.mark.parametrize(("tp", "cp", "dp"), [*SHAPES, (2, 4, 2), (4, 2, 3)])
def test_places_are_every_combination_tp_fastest(tp: int, cp: int, dp: int) -> None:
    places = [place(rank, tp=tp, cp=cp) for rank in range(tp * cp * dp)]
    assert places == [(t, c, d) for d, c, t in product(range(dp), range(cp), range(tp))]


def describe(tp: int, cp: int) -> dict[str, object]:
    mesh: Mesh = build_mesh(tp=tp, cp=cp)
    groups = {
        name: dist.get_process_group_ranks(getattr(mesh, f"{name}_group"))
        for name in ("tp", "cp", "dp", "zero")
    }
    ranks = {"tp": mesh.tp_rank, "cp": mesh.cp_rank, "dp": mesh.dp_rank, "zero": mesh.zero_rank}
    sizes = (mesh.tp, mesh.cp, mesh.dp, mesh.zero_size, mesh.world_size)
    return {"groups": groups, "ranks": ranks, "sizes": sizes, "rank": mesh.rank}


@pytest.mark.gloo
@pytest.mark.parametrize(("tp", "cp", "dp"), SHAPES)
def test_groups_hold_the_ranks_that_differ_in_one_axis(tp: int, cp: int, dp: int) -> None:
    world = range(tp * cp * dp)
    axes = {"tp": [0], "cp": [1], "dp": [2], "zero": [1, 2]}
    for rank, found in enumerate(run_ranks(len(world), describe, tp, cp)):
        here = place(rank, tp=tp, cp=cp)
        assert found["rank"] == rank
        assert found["sizes"] == (tp, cp, dp, cp * dp, tp * cp * dp)
        for name, free in axes.items():
            peers = [
                peer
                for peer in world
                if all(place(peer, tp=tp, cp=cp)[i] == here[i] for i in range(3) if i not in free)
            ]
            assert found["groups"][name] == peers
            assert found["ranks"][name] == peers.index(rank)


@pytest.mark.parametrize(
    ("driver", "seen", "cuda", "visible", "said"),
    [
        (False, 0, None, None, None),
        (True, 0, None, None, f"torch {torch.__version__} is built without CUDA"),
        (True, 0, "13.0", None, f"torch {torch.__version__} sees none of them"),
        (True, 0, "13.0", "", None),
        (True, 2, "13.0", None, "4 ranks, and torch sees 2 GPUs here"),
        (True, 4, "13.0", None, None),
    ],
)
def test_gpus_that_ranks_leave_idle_are_told(
    driver: bool,
    seen: int,
    cuda: str | None,
    visible: str | None,
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if driver:
        (tmp_path / "driver").touch()
    monkeypatch.setattr("parallel.mesh._DRIVER", tmp_path / "driver")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert why_on_cpu() == said
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # of a job without GPUs
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert why_on_cpu() == (said if seen else None)


def refusal(tp: int, cp: int) -> str:
    with pytest.raises(ValueError) as error:
        build_mesh(tp=tp, cp=cp)
    return str(error.value)


@pytest.mark.gloo
def test_a_world_that_is_no_multiple_is_refused_with_a_remedy() -> None:
    for message in run_ranks(3, refusal, 2, 1):
        assert "world size 3 is not a multiple of tp * cp = 2 * 1 = 2" in message
        assert "start 4 processes, or change tp or cp" in message


def alone() -> tuple[int, int, str]:
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    start_processes()
    start_processes()  # a second call joins nothing
    return dist.get_rank(), dist.get_world_size(), dist.get_backend()


@pytest.mark.gloo
def test_a_process_that_torchrun_did_not_start_stands_alone() -> None:
    assert run_ranks(1, alone) == [(0, 1, "gloo")]
