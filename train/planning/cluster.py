"""A cluster as the planner sees it: a YAML file of rates, each with its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BeforeValidator, Field

from train.settings.remedies import did_you_mean
from train.settings.units import ByteSize, Count, NonNegative, Positive, Section, parse_real

FOLDER = Path(__file__).parent / "clusters"

Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(parse_real)]


class Device(Section):
    """One GPU, or one CPU process."""

    kind: Literal["cuda", "cpu"] = Field(description="Decides how DeepSpeed reduces, and kernels.")
    peak_bf16: Positive = Field(description="FLOP/s of dense bfloat16 products, data sheet.")
    peak_fp32: Positive = Field(description="FLOP/s of float32 products as torch runs them.")
    matmul: Share = Field(description="Share of the peak that large products reach.")
    attention: Share = Field(description="Share that attention reaches, forward.")
    attention_backward: Share = Field(description="Share that attention reaches, backward.")
    memory_bytes: ByteSize = Field(description="Memory of the device that a process can use.")
    memory_rate: Positive = Field(description="Bytes/s that a copy moves, read and written.")
    host_rate: Positive = Field(description="Bytes/s of a copy between device and host.")
    launch_s: NonNegative = Field(description="Seconds from one small operation to the next.")
    reserved_bytes: ByteSize = Field(description="Taken before a tensor is made: context, NCCL.")
    fragmentation: NonNegative = Field(description="Share of activations lost between tensors.")

    def peak(self, element: int) -> float:
        """Return FLOP/s of products of numbers of so many bytes."""
        return self.peak_bf16 if element == 2 else self.peak_fp32


class Link(Section):
    """A kind of connection, as one rank sees it while its neighbours use it too."""

    rate: Positive = Field(description="Bytes/s each way.")
    latency_s: NonNegative = Field(description="Seconds of one hop of a message.")


class Cluster(Section):
    """Nodes of equal devices."""

    name: str = Field(description="What messages call it.")
    source: str = Field(description="Where the numbers come from.")
    device: Device = Field(description="One GPU, or one CPU process.")
    per_node: Count = Field(description="Devices of a node.")
    host_bytes: ByteSize = Field(description="Memory of a node's host.")
    node: Link = Field(description="Inside a node: NVLink.")
    network: Link = Field(description="Between nodes, a rank's share of it.")
    overlap: Share = Field(description="Share of messages that runs behind compute where it can.")
    disk_rate: Positive = Field(description="Bytes/s that a node writes to the shared disk.")
    failures_per_node_day: NonNegative = Field(description="Failures that stop a run.")
    restart_s: NonNegative = Field(description="Seconds from a failure to the next step.")

    def link(self, ranks: int, stride: int) -> Link:
        """Return the link of a ring over ranks that are `stride` apart: the slowest hop decides."""
        return self.node if ranks * stride <= self.per_node else self.network


def load_cluster(name: str | Path) -> Cluster:
    """Return a cluster by its file, or by the name of one that comes with longhaul.

    Raises ValueError where there is none, or it is not one.
    """
    path = Path(name)
    if not path.suffix:
        path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        hint = did_you_mean(str(name), known)
        raise ValueError(
            f"no cluster {name}: known are {', '.join(known)}{hint}; or name a YAML file, such as"
            " `longhaul plan --calibrate FILE` writes"
        )
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return Cluster.model_validate(values)
    except ValueError as error:
        raise ValueError(f"{path} does not describe a cluster: {error}") from error
