"""Run any function on N gloo ranks: forked processes, a file store, no ports, one thread each."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 120
"""Of one whole run; a collective that hangs fails after half of it."""
_LOOK_S = 0.2
"""Between two looks at whether the ranks that have not answered are alive."""


class RankFailure(RuntimeError):
    """A rank that raised, with its traceback, or the ranks that did not end."""


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return [function(*args) on rank 0, 1, ...] of one process group.

    The processes are forks: what this process has imported, and changed in it, they have too. So it
    must not have used a GPU, nor run a backward pass where there is one.
    Raises RankFailure with the traceback of a rank that fails, or the ranks that do not end.
    """
    return _run(size, True, function, args)


def run_alone(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args) of one forked process without any process group; see run_ranks."""
    return _run(1, False, function, args)[0]


def _run(size: int, group: bool, function: Callable[..., Any], args: Any) -> list[Any]:
    _warm()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        store = os.path.join(folder, "store") if group else None
        processes = [
            context.Process(target=_rank, args=(rank, size, store, queue, function, args))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        errors: list[str] = []
        pipe = queue._reader  # type: ignore[attr-defined]
        until = time.monotonic() + TIMEOUT_S
        while len(results) < size and not errors:
            silent = {rank: processes[rank] for rank in range(size) if rank not in results}
            lost = _ended(silent)
            if pipe.poll(0 if lost else _LOOK_S):  # what a rank said, it said before its end
                rank, ok, value = queue.get()
                if ok:
                    results[rank] = torch.load(io.BytesIO(value), weights_only=False)
                    continue
                silent.pop(rank, None)  # its peers wait in a collective, or it lost one of them
                time.sleep(_LOOK_S)
                lost, errors = _ended(silent), [f"rank {rank}:\n{value}"]
            elif not lost and time.monotonic() > until:
                errors.append(f"ranks {sorted(silent)} did not answer in {TIMEOUT_S} s")
            if lost:
                codes = [processes[rank].exitcode for rank in lost]
                errors.insert(0, f"ranks {lost} ended without an answer, exit codes {codes}")
        for process in processes:
            process.join(1 if errors else TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()
    if errors:
        raise RankFailure("\n".join(errors))
    return [results[rank] for rank in range(size)]


def _ended(processes: dict[int, Any]) -> list[int]:
    """Return the ranks that were ended: one that ends by itself has answered, and exits with 0."""
    return [rank for rank, process in processes.items() if process.exitcode]


def _rank(
    rank: int, size: int, store: str | None, queue: Any, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    # Of what it has of its parent nothing is garbage; DeepSpeed collects with each engine of stage
    # 3, for 0.25 s each, and pages that are shared would be copied.
    gc.freeze()
    try:
        if store is not None:
            _join(rank, size, store)
        # Not as tensors: those would travel as files that end with this process.
        result = io.BytesIO()
        torch.save(function(*args), result)
        queue.put((rank, True, result.getvalue()))
        if store is not None:
            with contextlib.suppress(RuntimeError):  # a peer that hangs is the one to be reported
                dist.barrier()
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
    finally:
        os._exit(0)  # no destructors: a group's would wait for peers that are gone


def _join(rank: int, size: int, store: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    files = dist.FileStore(store, size)  # type: ignore[attr-defined]  # the stub lacks it
    dist.init_process_group(
        "gloo",
        store=files,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
    )


def _warm() -> None:
    """Import what every rank needs once, before the fork; one thread, so that a fork is safe."""
    torch.set_num_threads(1)
    from torch import testing

    import parallel.megatron  # noqa: F401
    from parallel.zero import load_deepspeed

    load_deepspeed("cpu")
    testing.assert_close(torch.zeros(1), torch.zeros(1))
