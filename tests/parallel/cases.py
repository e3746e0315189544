"""Layouts of the suite as configurations, for the product's own check of them."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from model.config import ComputeConfig, LoraConfig, ModelConfig
from train.build import to_model_config
from train.checking import layout, plain
from train.checking.compare import Difference, compare
from train.checking.plain import Trained
from train.checking.shrink import STEPS, Subject
from train.settings.config import Config, validate

Memory = dict[str, Any] | list[dict[str, Any]]

MEMORIES: dict[str, Memory] = {
    "none": {"name": "none"},
    "window": {"name": "window", "segments": 2},
    "fam": {"name": "fam", "slots": 4, "window": 1},
    "fam-hidden": {"name": "fam", "slots": 4, "window": 1, "first": "hidden"},
    "infini": {"name": "infini", "gate_init": 0.5, "window": 1},
    "infini-delta": {"name": "infini", "rule": "delta", "gate_init": 0.5},
    "abc": {"name": "abc", "slots": 3},
    "cmab": {"name": "cmab", "latents": 3, "window": 1},
    "composed": [
        {"name": "window"},
        {"name": "fam", "slots": 4},
        {"name": "infini", "gate_init": 0.5},
        {"name": "abc", "slots": 2},
    ],
    "landmark": {"name": "landmark", "block": 2, "window": 1},
    "landmark-retrieve": {"name": "landmark", "block": 2, "window": 1, "retrieve": 2},
    "landmark-last": {"name": "landmark", "block": 2, "window": 1, "layers": "last"},
    "rmt": {"name": "rmt", "slots": 4, "state": "norm", "offset": True},
    "rmt-causal": {"name": "rmt", "slots": 2, "mask": "causal", "window": 1},
    "armt": {"name": "armt", "slots": 4, "key_dim": 4},
    "hmt": {"name": "hmt", "bank": 4, "sensory": 1, "search_dim": 4},
    "hmt-stage-1": {"name": "hmt", "bank": 4, "sensory": 2, "search_dim": 4, "search_from": 10**9},
}
INIT_STD = {"rmt": 0.1, "rmt-causal": 0.1, "armt": 0.05, "hmt": 0.15, "hmt-stage-1": 0.1}
"""Where segments go through the stack in turn, rounding does too, 4 segments deep. So their weights
are smaller: in one process float32 and float64 then differ by 3e-6 at most, as for the other
memories; at 0.2 by 1e-5 (rmt, hmt) and 3e-4 (armt). test_context has them in float64."""
LANES, SEGMENTS, SEGMENT_LEN = 4, 4, 16
CLIP = 0.3


@dataclass(frozen=True)
class Case:
    """One layout, and how one step is cut in time."""

    memory: str = "fam"
    tensor: str = "TP1"  # TP1, TP2, TP2+SP
    cp: int = 1
    exchange: str = "ring"
    layout: str = "zigzag"
    stage: int = 1
    dp: int = 1
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    windows: int = 1  # BPTT windows of a step
    micro_batches: int = 1
    bf16: bool = False
    tied: bool = False
    packed: bool = False
    bias: bool = False
    lora: LoraConfig | None = None

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return 1 if self.tensor == "TP1" else 2

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.tp * self.cp * self.dp

    def __str__(self) -> str:
        changed = [
            f"{name}={value}"
            for name, value in vars(self).items()
            if value != vars(Case())[name] and name != "compute"
        ]
        recompute = "" if self.compute == ComputeConfig() else self.compute.checkpointing
        recompute += " wavefront" * self.compute.wavefront + " fp8" * self.compute.fp8
        return " ".join([*changed, recompute]).strip() or "plain"


def subject_of(case: Case) -> Subject:
    """Return what runs: grouped heads, padded vocabulary, gradients of order 1.

    Gradients have a root mean square of 4e-3 here and round at 1e-9: so AdamW's eps is not 1e-8.
    """
    hidden, ffn, std = 32, 48, INIT_STD.get(case.memory, 0.2)
    if case.compute.fp8:  # 16 features and more a rank; weights that do not raise its rounding
        hidden, ffn, std = 64, 64, 0.08
    raw = {
        "name": "equivalence",
        "model": {
            "vocab_size": 90, "num_layers": 2, "hidden_size": hidden, "num_heads": 4,
            "num_kv_heads": 2, "ffn_size": ffn, "memory": MEMORIES[case.memory],
            "init_std": std, "tie_embeddings": case.tied,
            "qkv_bias": case.bias, "lora": None if case.lora is None else asdict(case.lora),
        },
        "data": {
            "train": "unused", "segment_len": SEGMENT_LEN, "sample_len": SEGMENTS * SEGMENT_LEN,
            "packing": case.packed,
        },
        "parallel": {
            "tp": case.tp, "cp": case.cp, "zero": case.stage, "layout": case.layout,
            "sequence_parallel": case.tensor == "TP2+SP", "attention": case.exchange,
        },
        "train": {
            "steps": STEPS + 1, "batch_size": LANES,
            "micro_batch": LANES // case.dp // case.micro_batches,
            "bptt_len": SEGMENTS // case.windows * SEGMENT_LEN,
            "precision": "bf16" if case.bf16 else "fp32",
            "lr": 4e-3, "eps": 1e-3, "clip": CLIP, **asdict(case.compute),
        },
    }  # fmt: skip
    return Subject(validate(raw, world_size=case.ranks), case.dp)


def config_of(case: Case) -> ModelConfig:
    """Return the case's model."""
    return to_model_config(subject_of(case).config, 0)


def reference(case: Case, dtype: torch.dtype = torch.float64) -> Trained:
    """Return what one plain process makes of a case: known once for all its layouts."""
    config = subject_of(case).config
    plainly = config.model_dump(mode="json", exclude={"parallel"})
    for key in ("checkpointing", "loss_chunk", "ffn_chunk", "wavefront", "micro_batch"):
        del plainly["train"][key]
    return _trained(json.dumps(plainly), dtype)


@functools.cache
def _trained(raw: str, dtype: torch.dtype) -> Trained:
    config: Config = validate(json.loads(raw))
    return plain.train(config, to_model_config(config, 0), dtype)


def differences_of(case: Case) -> tuple[list[Difference], Trained]:
    """Return how far the case's ranks are from one process, and what they have."""
    found, _ = layout.train(subject_of(case), config_of(case))
    own = torch.bfloat16 if case.bf16 else torch.float32
    return compare(found, reference(case), reference(case, own), config_of(case)), found
