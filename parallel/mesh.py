"""The mesh of processes: world = TP x CP x DP, TP fastest. Built once and passed."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel.heap import settle_heap

_DRIVER = Path("/dev/nvidiactl")
"""Where a machine or container has NVIDIA GPUs."""


@dataclass(frozen=True)
class Mesh:
    """This process's place, and the groups it talks in."""

    rank: int
    tp_rank: int
    cp_rank: int
    dp_rank: int
    tp: int
    cp: int
    dp: int
    tp_group: ProcessGroup
    cp_group: ProcessGroup
    dp_group: ProcessGroup
    zero_group: ProcessGroup  # DP x CP: over which gradients are summed and optimizer state is cut
    device: torch.device

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.cp * self.dp

    @property
    def zero_size(self) -> int:
        """Ranks of zero_group."""
        return self.dp * self.cp

    @property
    def zero_rank(self) -> int:
        """Place in zero_group."""
        return dist.get_rank(self.zero_group)


def place(rank: int, *, tp: int, cp: int) -> tuple[int, int, int]:
    """Return (tp_rank, cp_rank, dp_rank) of a global rank: TP fastest, then CP, then DP."""
    return rank % tp, rank // tp % cp, rank // (tp * cp)


def start_processes(
    timeout: timedelta = timedelta(minutes=30), *, tight_heap: bool = False
) -> None:
    """Join the processes torchrun started (or stand alone).

    NCCL where each process of this machine has a GPU of its own, else gloo and the CPU. The heap is
    settled (samples are made on the host beside a GPU, too); tight_heap: see settle_heap.
    """
    if dist.is_initialized():
        return
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backend = "nccl" if torch.cuda.device_count() >= local_ranks else "gloo"
    if backend == "nccl":  # before the first message, or all ranks of a node would use one GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    settle_heap(tight=tight_heap)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        # One process, no port. (The name is there at run time, the stub does not export it.)
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def why_on_cpu() -> str | None:
    """Return why the ranks of this machine leave its GPUs idle; None where it shows none."""
    ranks, seen = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if seen:
        return None if seen >= ranks else f"{ranks} ranks, and torch sees {seen} GPUs here"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    not_asked_for = "SLURM_JOB_ID" in os.environ and "SLURM_GPUS_ON_NODE" not in os.environ
    if hidden or not_asked_for or not _DRIVER.exists():
        return None
    built = "is built without CUDA" if torch.version.cuda is None else "sees none of them"
    return f"torch {torch.__version__} {built}"


def set_timeout(timeout: timedelta) -> None:
    """Let collectives that begin from now on, in every group there is, wait for so long."""
    world = dist.distributed_c10d._world
    for group in list(world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def build_mesh(*, tp: int, cp: int, timeout: timedelta = timedelta(minutes=30)) -> Mesh:
    """Return the mesh of the initialised default process group: on GPUs if that is NCCL's.

    timeout: of a collective, in whole minutes. Raises ValueError where the world size is not a
    multiple of tp * cp.
    """
    world = dist.get_world_size()
    if world % (tp * cp):
        raise ValueError(
            f"world size {world} is not a multiple of tp * cp = {tp} * {cp} = {tp * cp};"
            f" start {-(-world // (tp * cp)) * tp * cp} processes, or change tp or cp"
        )
    device = torch.device("cpu")
    if dist.get_backend() == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from parallel.megatron import parallel_state
    from parallel.megatron_cpu import install_cpu_adapter

    if device.type == "cpu":
        install_cpu_adapter()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            create_gloo_process_groups=False,  # a second set, for megatron's own checkpoints
            distributed_timeout_minutes=max(1, math.ceil(timeout.total_seconds() / 60)),
        )
    rank = dist.get_rank()
    tp_rank, cp_rank, dp_rank = place(rank, tp=tp, cp=cp)
    return Mesh(
        rank=rank,
        tp_rank=tp_rank,
        cp_rank=cp_rank,
        dp_rank=dp_rank,
        tp=tp,
        cp=cp,
        dp=world // (tp * cp),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        zero_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        device=device,
    )
