"""A plan: memory, time and cost of a configuration on a cluster."""

from __future__ import annotations

from typing import Any, NamedTuple

from data.wording import counted
from model.config import ModelConfig
from train.build import to_model_config
from train.planning.cluster import Cluster
from train.planning.memory import Memory, gib, memory_of
from train.planning.shapes import Shapes, shapes_of
from train.planning.states import retrieving
from train.planning.timing import (
    StepTime,
    checkpoint_bytes,
    save_seconds,
    save_stall,
    step_time,
)
from train.settings.config import Config
from train.speed.metrics import FORMULA_NAME, Peak, mfu, training_flops_per_token

DAY_S = 86_400.0


class Plan(NamedTuple):
    """What a run takes."""

    cluster: str
    shapes: Shapes
    memory: Memory
    time: StepTime
    tokens_per_step: int
    tokens_per_day: float  # of training, failures not counted
    mfu: float
    goodput: float  # share of the time in which training goes on: saves and failures taken off
    days: float  # of the whole run, at that goodput
    gpu_hours: float
    save_s: float  # until a checkpoint is on disk
    stall_s: float  # of it, what training waits for
    checkpoint_bytes: float
    not_counted: list[str]  # what else it takes that no configuration tells

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON: bytes, seconds, tokens."""
        return {
            "cluster": self.cluster,
            "layout": self.shapes._asdict() | {"world": self.shapes.world},
            "fits": self.memory.fits,
            "verdict": self.memory.verdict(),
            "memory": {"device": self.memory.parts, "host": self.memory.host}
            | {"limit": self.memory.limit, "host_limit": self.memory.host_limit},
            "step_s": self.time.total,
            "time": self.time._asdict(),
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_day": self.tokens_per_day,
            "mfu": self.mfu,
            "mfu_formula": FORMULA_NAME,
            "goodput": self.goodput,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
            "save_s": self.save_s,
            "stall_s": self.stall_s,
            "checkpoint_bytes": self.checkpoint_bytes,
            "not_counted": self.not_counted,
        }

    def describe(self) -> list[str]:
        """Return the plan in lines."""
        s = self.shapes
        lines = [
            f"{counted(s.world, 'rank')} on {self.cluster}: TP {s.tp} x CP {s.cp} x DP {s.dp};"
            f" {s.passes} passes a step of {s.batch} x {s.segments} segments,"
            f" {s.length:,} tokens of each on a rank",
            f"memory of a rank: {self.memory.verdict()}",
        ]
        lines += _table({name: gib(size) for name, size in self.memory.parts.items() if size})
        host = sum(self.memory.host.values())
        lines.append(f"host memory of a node: {gib(host)} of {gib(self.memory.host_limit)}")
        lines += _table({name: gib(size) for name, size in self.memory.host.items() if size})
        lines.append(f"step: {seconds(self.time.total)}")
        lines += _table(
            {
                name.replace("_", " "): f"{seconds(part)} ({part / self.time.total:.0%})"
                for name, part in self.time._asdict().items()
                if part / self.time.total >= 0.0005
            }
        )
        per_rank = self.tokens_per_step / self.time.total / s.world
        lines += [
            f"tokens: {self.tokens_per_step:,} a step, {self.tokens_per_day:,.3g} a day,"
            f" {per_rank:,.0f} a second and rank; MFU {self.mfu:.1%} ({FORMULA_NAME})",
            f"checkpoint: {gib(self.checkpoint_bytes)}, on disk after {seconds(self.save_s)};"
            f" training waits {seconds(self.stall_s)}",
            f"run: {self.days:.2f} days, {self.gpu_hours:,.0f} device-hours, goodput"
            f" {self.goodput:.1%}",
        ]
        return lines + [f"not counted: {what}" for what in self.not_counted]


def plan(
    config: Config,
    cluster: Cluster,
    nodes: int,
    ranks_per_node: int,
    *,
    vocab_size: int = 0,
    keys: float | None = None,
) -> Plan:
    """Return what a configuration, checked for nodes * ranks_per_node ranks, takes on a cluster.

    vocab_size: where the configuration leaves it out. keys: that a token reads, where segments are
    packed; None: counted as whole segments.
    """
    model = to_model_config(config, vocab_size)
    shapes = shapes_of(config, nodes * ranks_per_node)
    cluster = cluster.model_copy(update={"per_node": ranks_per_node})
    return plan_of(config, model, shapes, cluster, keys)


def plan_of(
    config: Config,
    model: ModelConfig,
    shapes: Shapes,
    cluster: Cluster,
    keys: float | None = None,
) -> Plan:
    """Return the plan of a model in a layout."""
    time = step_time(config, model, shapes, cluster, keys)
    tokens = config.train.batch_size * config.data.sample_len
    flops = training_flops_per_token(model, config.data.segment_len, keys)
    device = cluster.device
    peak = Peak(device.peak_bf16 if shapes.element == 2 else device.peak_fp32, cluster.name)
    goodput = _goodput(config, time.total, shapes, cluster)
    days = config.train.steps * time.total / DAY_S / goodput
    return Plan(
        cluster=cluster.name,
        shapes=shapes,
        memory=memory_of(config, model, shapes, cluster, cluster.per_node),
        time=time,
        tokens_per_step=tokens,
        tokens_per_day=tokens / time.total * DAY_S,
        mfu=mfu(tokens / time.total, flops, peak, shapes.world),
        goodput=goodput * (1 - time.saving / time.total),
        days=days,
        gpu_hours=days * 24 * shapes.world,
        save_s=save_seconds(model, shapes, cluster),
        stall_s=save_stall(config, model, shapes, cluster),
        checkpoint_bytes=checkpoint_bytes(model),
        not_counted=_not_counted(model, shapes),
    )


def _not_counted(model: ModelConfig, shapes: Shapes) -> list[str]:
    """Return what grows with documents, whose lengths only the data know."""
    found = []
    for memory in retrieving(model.memory):
        layers = model.num_layers if memory.layers == "all" else 1
        width = model.num_kv_heads * model.head_dim // shapes.tp
        size = 2 * width * shapes.element * layers
        found.append(
            f"landmark's blocks, {size:,} bytes of host memory on each rank for each token of"
            " each of its lanes' documents, twice that while they grow; what reading them takes"
        )
    return found


def _goodput(config: Config, step_s: float, shapes: Shapes, cluster: Cluster) -> float:
    """Return the share of time that failures leave: each costs half an interval and a restart."""
    nodes = -(-shapes.world // cluster.per_node)
    failures_per_s = cluster.failures_per_node_day * nodes / DAY_S
    lost = config.checkpoint.every * step_s / 2 + cluster.restart_s
    return 1.0 / (1.0 + failures_per_s * lost)


def _table(rows: dict[str, str]) -> list[str]:
    width = max((len(name) for name in rows), default=0)
    return [f"  {name:<{width}}  {value:>10}" for name, value in rows.items()]


def seconds(value: float) -> str:
    """Return a duration with its unit."""
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"
