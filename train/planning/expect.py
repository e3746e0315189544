"""What the plan says of a run on the machine at hand, before anything was measured: a bound."""

from __future__ import annotations

import os

import torch

from train.planning.cluster import Cluster, Link, load_cluster
from train.planning.plan import Plan, plan
from train.settings.config import Config

_KNOWN = ("h200", "h100", "a100")
_SLOW_CPU = {
    "kind": "cpu",
    "peak_bf16": 5e9,  # a tenth of a core that has nothing else to do
    "peak_fp32": 5e9,
    "matmul": 1.0,
    "attention": 1.0,
    "attention_backward": 1.0,
    "memory_rate": 1e9,
    "host_rate": 1e9,
    "launch_s": 1e-4,
}
_SLOW_LINK = Link(rate=5e7, latency_s=1e-3)


def expect(config: Config, vocab_size: int, ranks: int, gpu: str | None) -> Plan:
    """Return what a run may well take here; data and compilation are not in its time.

    gpu: the name of a rank's, None on a CPU; of an unknown one the oldest known is thought. How
    many ranks a node has is torchrun's to say.
    """
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
    nodes = max(1, ranks // per_node)
    return plan(config, _cluster(gpu), nodes, ranks // nodes, vocab_size=vocab_size)


def gpu_name() -> str | None:
    """Return the name of the GPU that this process computes on, None where it has none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _cluster(gpu: str | None) -> Cluster:
    words = (gpu or "").lower().replace("-", " ").split()
    name = next((known for known in _KNOWN if known in words), _KNOWN[-1])
    cluster = load_cluster(name)
    if gpu is not None:
        return cluster
    slow = cluster.device.model_copy(update=_SLOW_CPU)
    return cluster.model_copy(update={"device": slow, "node": _SLOW_LINK, "network": _SLOW_LINK})
