"""Seconds of a step on a described cluster, by part.

Compute is the FLOPs of train.speed.metrics over achieved rates; messages are bytes over rates and
hops over latencies, hidden behind compute where the code lets them be. Operations take a least time
each, which is what the memory's chain, small and in turn, is made of.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from model.config import ModelConfig
from train.planning.activations import activations_of_layer
from train.planning.cluster import Cluster
from train.planning.shapes import Shapes, block_calls, rows_in_turn
from train.planning.states import WIDE, parts_of
from train.planning.weights import count_weights
from train.settings.config import Config
from train.speed.metrics import forward_flops_per_token

OPERATIONS = 136
"""Of a layer, forward and backward, as the dry run counts them; a third more with checkpointing."""

CHAIN = {"fam": 172, "rmt": 211, "armt": 426, "hmt": 291}
"""Operations that a memory adds in a layer for each segment (dry run)."""

SCAN = {"infini": 28, "abc": 58, "cmab": 58}
"""Likewise, of one that joins all segments in log2 of their number steps, for each of these."""

OWN_ROWS = ("fam",)
"""Memories whose chain puts rows of its own, and no others, through a layer's weights."""

BACKWARD_ATTENTION = 2.5
"""FLOPs of attention's backward over its forward's: the fused kernels compute scores again."""


class StepTime(NamedTuple):
    """Seconds of one optimizer step."""

    matrices: float
    attention: float
    elementwise: float  # norms, activations, rotations: what moves through memory
    recomputation: float
    chain: float  # the memory, segment by segment
    waiting: float  # of the device for the next operation
    tensor_parallel: float
    context_parallel: float  # what compute does not hide
    zero: float  # what the backward does not hide
    optimizer: float
    saving: float  # a step's share of what a checkpoint stalls

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self)


class _Pass(NamedTuple):
    """One forward pass of a rank, its backward twice as much in matrices."""

    matrices: float
    attention: float
    elementwise: float


def step_time(
    config: Config,
    model: ModelConfig,
    shapes: Shapes,
    cluster: Cluster,
    keys: float | None = None,
) -> StepTime:
    """Return the seconds of a step. keys: that a token reads, where segments are packed."""
    device, passes, mode = cluster.device, shapes.passes, config.train.checkpointing
    forward = _forward(config, model, shapes, cluster, keys)
    attention_back = (
        BACKWARD_ATTENTION * forward.attention * device.attention / device.attention_backward
    )
    matrices, attention = 3 * forward.matrices, forward.attention + attention_back
    again = sum(forward) if mode == "block" else forward.elementwise * (mode == "selective")
    again += _chunks_again(config, model, shapes, cluster)
    tensor = _tensor_parallel(model, shapes, cluster, mode)
    context = _context_parallel(config, model, shapes, cluster, forward.attention, attention_back)
    chain = _chain(config, model, shapes, cluster)
    busy = matrices + attention + 3 * forward.elementwise + again
    operations = OPERATIONS * (4 / 3 if mode != "none" else 1)
    operations *= block_calls(config, model, shapes)
    waiting = max(0.0, operations * device.launch_s - busy)
    backward = 2 * forward.matrices + attention_back + 2 * forward.elementwise
    optimizer = _optimizer_bytes(model, shapes) / device.memory_rate
    return StepTime(
        matrices=matrices * passes,
        attention=attention * passes,
        elementwise=3 * forward.elementwise * passes,
        recomputation=again * passes,
        chain=chain * passes,
        waiting=waiting * passes,
        tensor_parallel=tensor * passes,
        context_parallel=context * passes,
        zero=_zero(config, model, shapes, cluster, backward),
        optimizer=optimizer,
        saving=save_stall(config, model, shapes, cluster) / config.checkpoint.every,
    )


def _forward(
    config: Config, model: ModelConfig, shapes: Shapes, cluster: Cluster, keys: float | None
) -> _Pass:
    device = cluster.device
    peak = device.peak(shapes.element)
    flops = forward_flops_per_token(model, config.data.segment_len, keys)
    tokens = shapes.rows / shapes.tp
    uneven = 1.0
    if config.parallel.layout == "contiguous":
        uneven = 2.0 - 1.0 / shapes.cp  # the last rank reads all ranks' keys
    moved = 2 * model.num_layers * activations_of_layer(config, model, shapes)
    return _Pass(
        tokens * (flops.matrices + flops.memory) / (peak * device.matmul),
        tokens * flops.attention * uneven / (peak * device.attention),
        moved / device.memory_rate,
    )


def _chunks_again(config: Config, model: ModelConfig, shapes: Shapes, cluster: Cluster) -> float:
    """Return the seconds in which backward computes gate and up of the FFN's chunks again."""
    chunk = config.train.ffn_chunk
    if chunk is None or shapes.rows <= chunk:
        return 0.0
    device = cluster.device
    flops = 2.0 * shapes.rows / shapes.tp * 2 * model.hidden_size * model.ffn_size
    return model.num_layers * flops / (device.peak(shapes.element) * device.matmul)


def _tensor_parallel(model: ModelConfig, shapes: Shapes, cluster: Cluster, mode: str) -> float:
    """Return the seconds that a pass waits for gathers and scatters of rows.

    Four of a layer forward; six backward, of which megatron hides the two that gather again.
    """
    if shapes.tp == 1:
        return 0.0
    link = cluster.link(shapes.tp, 1)
    message = shapes.element * shapes.rows * model.hidden_size * (shapes.tp - 1) / shapes.tp
    calls = 12 if mode == "block" else 8
    turns = shapes.segments if rows_in_turn(model) else 1
    hops = calls * turns * (shapes.tp - 1) * link.latency_s
    volume = calls * message / link.rate
    return model.num_layers * (hops + volume)


def _context_parallel(
    config: Config,
    model: ModelConfig,
    shapes: Shapes,
    cluster: Cluster,
    attention: float,
    attention_back: float,
) -> float:
    """Return what attention's compute does not hide of keys and gradients on their way."""
    cp = shapes.cp
    if cp == 1:
        return 0.0
    link = cluster.link(cp, shapes.tp)
    reach = (model.window + shapes.segments) / shapes.segments
    keys = shapes.rows * reach * model.num_kv_heads * model.head_dim / shapes.tp
    pair, gradient = 2 * shapes.element * keys, 2 * WIDE * keys
    calls = shapes.segments if rows_in_turn(model) else 1
    latency = link.latency_s * calls
    layers, again = model.num_layers, 2 if config.train.checkpointing == "block" else 1
    if config.parallel.attention == "all_gather":
        moved = (cp - 1) * ((1 + again) * pair + gradient) / link.rate
        return layers * (moved + (2 + again) * (cp - 1) * latency)
    hop, hop_back = pair / link.rate + latency, (pair + gradient) / link.rate + latency
    share = cluster.overlap
    per_hop, per_hop_back = attention / layers / cp, attention_back / layers / cp
    waits = again * (cp - 1) * max(hop - share * per_hop, 0.0)
    # Back: keys alone, keys with others' gradients, gradients alone; beside the first and the last
    # a rank computes its own part, by heads.
    heads = model.num_kv_heads // shapes.tp
    early = (heads + 1) // 2 / heads
    waits += max(hop - early * share * per_hop_back, 0.0)
    waits += (cp - 2) * max(hop_back - share * per_hop_back, 0.0)
    waits += max(gradient / link.rate + latency - (1 - early) * share * per_hop_back, 0.0)
    return layers * waits


def _chain(config: Config, model: ModelConfig, shapes: Shapes, cluster: Cluster) -> float:
    """Return the seconds of what memory does segment by segment, or joining them.

    Operations and short messages; and for a few rows a product takes as long as its weight is read:
    in its forwards, and once in its backward (`model.deferred`).
    """
    names = [part.name for part in parts_of(model.memory)]
    operations = sum(CHAIN.get(name, 0) for name in names)
    joins = sum(SCAN.get(name, 0) for name in names)
    twice = config.train.checkpointing == "block"  # its forward
    again = 4 / 3 if twice else 1.0
    small = operations * cluster.device.launch_s
    steps = math.ceil(math.log2(shapes.segments + 1))  # what was carried is one more
    at_once = model.num_layers * joins * steps * cluster.device.launch_s
    messages = 0.0
    if shapes.tp > 1 and not {"fam", "rmt", "armt", "hmt"}.isdisjoint(names):
        messages += 8 * (shapes.tp - 1) * cluster.link(shapes.tp, 1).latency_s
    hops = 3 * (shapes.cp - 1) * cluster.link(shapes.cp, shapes.tp).latency_s
    if operations and shapes.cp > 1:
        messages += hops
    if joins and shapes.cp > 1:
        at_once += model.num_layers * hops
    calls = model.num_layers * shapes.segments
    if config.train.wavefront:
        calls = block_calls(config, model, shapes)
    block = count_weights(model).blocks * shapes.element / model.num_layers / shapes.tp
    reads = sum(name in OWN_ROWS for name in names) * (2 + twice) * block
    chain = calls * (again * (small + messages) + reads / cluster.device.memory_rate)
    return again * at_once + chain


def _zero(
    config: Config, model: ModelConfig, shapes: Shapes, cluster: Cluster, backward: float
) -> float:
    """Return what a step waits for sums of gradients and gathers of weights."""
    if shapes.zero == 1:
        return 0.0
    weights = count_weights(model)
    link = cluster.link(shapes.zero, shapes.tp)
    part = (shapes.zero - 1) / shapes.zero
    # DeepSpeed's stage 1 sends sums over all ranks, stages 2 and 3 each rank's share
    gradients = WIDE * weights.trained(shapes.tp) * part / link.rate
    gather = shapes.element * weights.held(shapes.tp) * part / link.rate
    stage = config.parallel.zero
    times = 1 if stage == 1 else shapes.passes
    hidden = cluster.overlap * backward if cluster.device.kind == "cuda" else 0.0
    reduced = times * max(0.0, gradients - hidden)
    if stage < 3:
        return reduced + gather
    again = 3 if config.train.checkpointing == "block" else 2
    return reduced + times * max(0.0, again * gather - hidden)


def _optimizer_bytes(model: ModelConfig, shapes: Shapes) -> float:
    """Return what AdamW reads and writes: gradient, master and moments, and the weight."""
    share = count_weights(model).trained(shapes.tp) / shapes.zero
    return share * (7 * WIDE + shapes.element) + 3 * WIDE * share


def checkpoint_bytes(model: ModelConfig) -> float:
    """Return the bytes of a checkpoint: master weights and moments of the whole model."""
    weights = count_weights(model)
    return WIDE * (weights.total + 2 * (weights.trained_cut + weights.trained_whole))


def save_seconds(model: ModelConfig, shapes: Shapes, cluster: Cluster) -> float:
    """Return the seconds that the nodes take to write a checkpoint."""
    nodes = -(-shapes.world // cluster.per_node)
    return checkpoint_bytes(model) / (cluster.disk_rate * nodes)


def save_stall(config: Config, model: ModelConfig, shapes: Shapes, cluster: Cluster) -> float:
    """Return the seconds that training waits at a checkpoint."""
    if config.checkpoint.asynchronous:
        return checkpoint_bytes(model) / shapes.world / cluster.device.host_rate
    return save_seconds(model, shapes, cluster)
