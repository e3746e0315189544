"""What a thread that does not go on is in: the collective, its group, and the line that called it.

Read from the thread's frames when it is asked for, so it costs nothing while all is well. On NCCL a
collective returns at once and the thread waits later, for the device: there the last collectives
that were begun, from torch's flight recorder, tell which one it is.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from train.watch import waiting

_ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(str(_ROOT / name) for name in ("model", "parallel", "data", "train", "tests"))
_RING = str(_ROOT / "parallel" / "ring.py")
_C10D = str(Path(torch.distributed.__file__).parent)
_COUNTED = str(Path(waiting.__file__))
"""Every wait passes through it."""


def describe_thread(ident: int) -> str:
    """Return what a thread is in, such as `all_reduce over CP [ranks 0, 1], model/x.py:12 in f`.

    Where it only waits for autograd, whose own thread runs the backward on a GPU, what that is in.
    """
    found = sys._current_frames()
    known = {thread.ident for thread in threading.enumerate()}
    stacks = [_frames(found.get(ident)), *(_frames(found[i]) for i in found if i not in known)]
    stack = next((frames for frames in stacks if _collective(frames) is not None), stacks[0])
    if not stack:
        return "nothing: its thread has ended"
    name = _collective(stack)
    ours = [frame for frame in stack if _file(frame).startswith(_OURS) and _file(frame) != _COUNTED]
    where = _line((ours or stack)[0])
    if name is None:
        return f"no collective, {where}"
    group = next((held for frame in stack if (held := _group_in(frame)) is not None), None)
    return f"{name} over {describe_group(group)}, {where}"


def _frames(frame: FrameType | None) -> list[FrameType]:
    """Return a stack's frames, the innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _collective(frames: list[FrameType]) -> str | None:
    """Return what the frames call in torch.distributed, None where they are not inside it."""
    if any(_file(frame) == _RING and frame.f_code.co_name == "wait" for frame in frames):
        return "a hop of the ring"
    names = [frame.f_code.co_name for frame in frames if _file(frame).startswith(_C10D)]
    names = [name for name in names if name != "wrapper"]
    return names[-1] if names else None  # the outermost: what was called


def describe_group(group: dist.ProcessGroup | None) -> str:
    """Return a group's name and ranks."""
    if group is None or group == dist.group.WORLD:
        return "all ranks"
    ranks = dist.get_process_group_ranks(group)
    listed = ", ".join(map(str, ranks[:16])) + ", ..." * (len(ranks) > 16)
    return f"{group.group_desc or group.group_name} [ranks {listed}]"


def last_collectives() -> list[str]:
    """Return a line for each group: the last collective that this rank began there."""
    if not dist.is_initialized():
        return []
    name = "_dump_nccl_trace_json" if dist.get_backend() == "nccl" else "_dump_fr_trace_json"
    dump: Any = getattr(torch._C._distributed_c10d, name, None)
    if dump is None:  # a private name of torch, which may change
        return []
    last = {entry["pg_id"]: entry for entry in json.loads(dump()).get("entries", [])}
    return [
        f"{' '.join(filter(None, entry['process_group']))}: {entry['profiling_name']} number"
        f" {entry['collective_seq_id']}, sizes {entry['input_sizes']}"
        # gloo's entries stay `scheduled` when they are done
        + (f", {entry['state']}" if dist.get_backend() == "nccl" else "")
        for entry in last.values()
    ]


def _group_in(frame: FrameType) -> dist.ProcessGroup | None:
    """Return the group that a frame works with, where it has one under the usual names."""
    found = frame.f_locals.get("group")
    if found is None:
        found = getattr(frame.f_locals.get("self"), "group", None)
    return found if isinstance(found, dist.ProcessGroup) else None


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename


def _line(frame: FrameType) -> str:
    path = Path(_file(frame))
    # a library's file by its last three parts: its place differs from node to node
    shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else Path(*path.parts[-3:])
    return f"{shown}:{frame.f_lineno} in {frame.f_code.co_name}"
