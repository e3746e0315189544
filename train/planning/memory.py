"""Bytes that a rank and a node need while a run trains, by part, and what would shrink them."""

from __future__ import annotations

from typing import NamedTuple

from model.config import ModelConfig
from train.planning.activations import activations
from train.planning.cluster import Cluster
from train.planning.shapes import Shapes
from train.planning.weights import count_weights
from train.planning.zero_rule import zero_bytes
from train.settings.config import Config

PROCESS_BYTES = 3 << 30
"""Host memory of a training process with torch, CUDA's libraries and the tracker."""

TOKEN_BYTES = 16
"""Of a token and its label, as the loader's threads hold them."""

REMEDIES = {
    "parameters": "raise parallel.tp, or parallel.zero=3",
    "gradients": "parallel.zero=2 (or 3), or raise parallel.tp",
    "master weights": "more ranks, or raise parallel.tp",
    "moments": "more ranks, or raise parallel.tp",
    "gathered weights": "parallel.zero=2, or raise parallel.tp",
    "layers": "train.checkpointing=block, raise parallel.cp, lower train.micro_batch or bptt_len",
    "memory graph": "lower train.bptt_len or train.micro_batch, or train.checkpointing=block",
    "one layer": "set train.ffn_chunk, raise parallel.cp or tp, lower train.micro_batch",
    "stacked weights": "train.wavefront=false",
    "ring messages": "parallel.attention=ring, or lower parallel.cp",
    "logits": "lower train.loss_chunk",
    "memory state": "lower train.micro_batch or the memory's window",
}


BATCHES_AHEAD = 2
"""Of each of a rank's loader threads (data.loader)."""


class Memory(NamedTuple):
    """Bytes of one rank at its peak, and of one node's host."""

    parts: dict[str, int]  # on the device
    host: dict[str, int]
    limit: int  # of the device
    host_limit: int
    one_state: int = 0  # bytes of the state that one pass leaves

    @property
    def total(self) -> int:
        """All parts on the device."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether device and host have room."""
        return self.total <= self.limit and sum(self.host.values()) <= self.host_limit

    def verdict(self) -> str:
        """Return whether it fits; where it does not, which part to shrink and how."""
        if self.total > self.limit:
            name = max(REMEDIES, key=lambda part: self.parts.get(part, 0))
            over = self.total - self.limit
            return (
                f"does not fit: {gib(self.total)} of {gib(self.limit)}, {gib(over)} too much; the"
                f" largest part is {name}, {gib(self.parts[name])}: {REMEDIES[name]}"
            )
        host = sum(self.host.values())
        if host > self.host_limit:
            name = max(self.host, key=lambda part: self.host[part])
            return (
                f"the node does not fit: {gib(host)} of {gib(self.host_limit)}; the largest part"
                f" is {name}, {gib(self.host[name])}"
            )
        return f"fits: {gib(self.total)} of {gib(self.limit)}"

    def largest(self, count: int = 5) -> str:
        """Return the largest parts on the device, and how to shrink the first that can be."""
        parts = sorted(self.parts, key=lambda part: -self.parts[part])
        shown = ", ".join(f"{part} {gib(self.parts[part])}" for part in parts[:count])
        first = next(part for part in parts if part in REMEDIES)
        return f"{shown}; {first}: {REMEDIES[first]}"


def memory_of(
    config: Config, model: ModelConfig, shapes: Shapes, cluster: Cluster, ranks_per_node: int
) -> Memory:
    """Return what a checked configuration needs on a cluster."""
    weights, cuda = count_weights(model), cluster.device.kind == "cuda"
    zero = zero_bytes(
        stage=config.parallel.zero,
        held=weights.held(shapes.tp),
        trained=weights.trained(shapes.tp),
        ranks=shapes.zero,
        element=shapes.element,
        cuda=cuda,
    )
    work = activations(config, model, shapes, cluster.device.kind)
    micro_batches = config.train.batch_size // shapes.dp // config.train.micro_batch
    parts = {
        "parameters": zero.parameters,
        "gradients": zero.gradients,
        "master weights": zero.master,
        "moments": zero.moments,
        "reduction buckets": zero.buckets,
        "gathered weights": zero.gathered,
        "layers": int(work.layers - work.memory),
        "memory graph": int(work.memory),
        "one layer": int(work.recomputed + work.backward),
        "stacked weights": int(work.stacked),
        "ring messages": int(work.messages),
        "logits": int(work.logits),
        # each micro-batch keeps its own from step to step, and a step that may be undone the last
        "memory state": int(work.state * (1 + micro_batches)),
    }
    parts["fragmentation"] = int(cluster.device.fragmentation * (work.total + zero.gathered))
    parts["reserved"] = cluster.device.reserved_bytes
    copied = 0
    if config.checkpoint.asynchronous or cuda:
        copied = zero.master + zero.moments + int(work.state * micro_batches)
    ahead = 1 + BATCHES_AHEAD * config.data.workers
    batch = config.train.batch_size // shapes.dp * config.data.sample_len * TOKEN_BYTES
    host = {
        "checkpoint copies": copied * ranks_per_node,
        "batches read ahead": ahead * batch * ranks_per_node,
        "processes": PROCESS_BYTES * ranks_per_node if cuda else 0,
    }
    if not cuda:
        host["ranks"] = sum(parts.values()) * ranks_per_node
    limits = (cluster.device.memory_bytes, cluster.host_bytes)
    return Memory(parts, host, *limits, int(work.state))


def gib(size: float) -> str:
    """Return bytes as GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
