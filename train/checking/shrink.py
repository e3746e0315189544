"""From a user's configuration to a model of seconds with every switch of it.

Sizes become the smallest that still have every part: two layers, four heads, four segments, two
micro-batches, several chunks of logits. Switches stay. What a run cannot show in three steps is
made to happen: weights and gradients are of order 1, clipping clips, the rate is high, both stages
of a schedule come up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from model.config import VOCAB_MULTIPLE
from train.settings.config import Config, validate

SEGMENT_LEN = 16
SEGMENTS = 4
STEPS = 3

INIT_STD = {"rmt": 0.1, "armt": 0.05, "hmt": 0.1}
"""Where segments go through the stack in turn, rounding does too: their weights are smaller."""

MOST = {
    "slots": 4, "latents": 3, "bank": SEGMENTS, "sensory": 2, "search_dim": 4, "key_dim": 4,
    "segments": 2, "window": 2, "block": 2, "retrieve": 2, "search_from": 1, "beta": 2.0,
}  # fmt: skip
"""Of a memory's options. Blocks of 2 fit every slice; a search from step 1 has both stages; a
sharper latch makes a hundred times more of rounding, which would hide what is small."""


class Subject(NamedTuple):
    """What is checked: a small configuration, and its data-parallel ranks."""

    config: Config
    dp: int

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.config.parallel.tp * self.config.parallel.cp * self.dp

    def describe(self) -> str:
        """Return the layout and what runs on it, in one line."""
        config, parallel = self.config, self.config.parallel
        scattered = "+SP" if parallel.sequence_parallel and parallel.tp > 1 else ""
        ring = f" ({parallel.attention}, {parallel.layout})" if parallel.cp > 1 else ""
        return (
            f"TP {parallel.tp}{scattered} x CP {parallel.cp}{ring} x DP {self.dp}, ZeRO"
            f" {parallel.zero}, memory {config.model.memory.name}, {config.train.precision}"
        )


def shrink(config: Config, most_ranks: int) -> Subject:
    """Return the configuration in small, on at most so many ranks.

    Raises ValueError where they do not hold two ranks of each kind of parallelism.
    """
    tp, cp, dp = shrink_layout(config, most_ranks)
    raw = config.model_dump(mode="json")
    raw["parallel"] |= {"tp": tp, "cp": cp, "timeout_s": 60.0}
    raw["model"] |= _model(config)
    raw["data"] |= _data(config)
    raw["train"] |= _train(config, dp)
    return Subject(validate(raw, source="the shrunk configuration", world_size=tp * cp * dp), dp)


def shrink_layout(config: Config, most_ranks: int) -> tuple[int, int, int]:
    """Return (tp, cp, dp): two of each kind that the configuration has or can have.

    CP grows to 4 where there is room: a ring of 2 has no rank in its middle.
    """
    wanted_tp, wanted_cp = config.parallel.tp, config.parallel.cp
    tp, cp = min(wanted_tp, 2), min(wanted_cp, 2)
    if tp * cp > most_ranks:
        raise ValueError(
            f"--ranks {most_ranks} cannot hold parallel.tp={wanted_tp} and parallel.cp={wanted_cp}"
            f" with two ranks of each; use --ranks {tp * cp} or more"
        )
    lanes = config.train.batch_size // config.train.micro_batch
    dp = 2 if lanes >= 2 and 2 * tp * cp <= most_ranks else 1
    if wanted_cp >= 4 and 4 * tp * dp <= most_ranks:
        cp = 4
    return tp, cp, dp


def changes(config: Config, subject: Subject) -> Iterator[tuple[str, object, object]]:
    """Yield (dotted key, was, is) of what shrinking changed."""
    was, now = (flatten(c.model_dump(mode="json")) for c in (config, subject.config))
    for key, value in was.items():
        if key in now and now[key] != value:
            yield key, value, now[key]


def flatten(raw: object, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings and lists by dotted key."""
    if not isinstance(raw, dict | list):
        return {prefix: raw}
    items = raw.items() if isinstance(raw, dict) else enumerate(raw)
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _model(config: Config) -> dict[str, Any]:
    model = config.model
    grouped = model.num_kv_heads < model.num_heads
    own_width = model.head_dim not in (None, model.hidden_size // model.num_heads)
    padded = model.vocab_size is None or model.vocab_size % VOCAB_MULTIPLE > 0
    raw = model.model_dump(mode="json")
    memory, lora = copy.deepcopy(raw["memory"]), raw["lora"]
    parts = memory if isinstance(memory, list) else [memory]
    for part in parts:
        part.update({key: min(part[key], MOST[key]) for key in MOST if key in part})
        if part.get("random_state_passing"):
            part["random_state_passing"] = 1.0  # every document of the later steps
    if lora is not None:
        rank = min(lora["rank"], 3)
        lora = lora | {"rank": rank, "alpha": lora["alpha"] * rank / lora["rank"]}
    return {
        "vocab_size": 90 if padded else 2 * VOCAB_MULTIPLE,
        "num_layers": min(model.num_layers, 2),
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": min(model.num_kv_heads, 2) if grouped else 4,
        "head_dim": 12 if own_width else 8,
        "ffn_size": 48,
        "init_std": min(INIT_STD.get(part["name"], 0.2) for part in parts),
        "sliding_window": None,
        "init_from": None,
        "memory": memory,
        "lora": lora,
    }


def _data(config: Config) -> dict[str, Any]:
    per_window, windows = _windows(config)
    return {"segment_len": SEGMENT_LEN, "sample_len": per_window * windows * SEGMENT_LEN}


def _windows(config: Config) -> tuple[int, int]:
    """Return (segments of a BPTT window, windows of a sample)."""
    windows = config.num_segments // config.bptt_segments
    per_window = min(config.bptt_segments, SEGMENTS if windows == 1 else SEGMENTS // 2)
    return per_window, min(windows, SEGMENTS // per_window)


def _train(config: Config, dp: int) -> dict[str, Any]:
    train = config.train
    per_window, windows = _windows(config)
    micro = min(train.micro_batch, 2)
    several = train.batch_size // train.micro_batch >= 2 * dp
    rows = train.micro_batch * config.bptt_segments * config.data.segment_len
    return {
        "steps": STEPS + 1,
        "batch_size": dp * micro * (2 if several else 1),
        "micro_batch": micro,
        "bptt_len": per_window * SEGMENT_LEN if windows > 1 else None,
        "curriculum": [{"until": 1, "segments": 1}] if train.curriculum else [],
        # of 32 and more rows, so that the last piece is a part
        "loss_chunk": 24 if train.loss_chunk < rows // config.parallel.cp else 1024,
        "ffn_chunk": None if train.ffn_chunk is None else 24,
        "wavefront": train.wavefront,
        "fp8": False,  # its rounding would hide what is looked for
        "lr": 4e-3,
        "min_lr": 1e-3 if train.min_lr else 0.0,
        "warmup_steps": 0,
        "decay_steps": 2 if train.schedule == "wsd" else None,
        "compile": False,  # in a forked process the compiler's own do not answer
        # With Adam's usual 1e-8 a gradient that is 0 but for rounding would move its weight by the
        # sign of the rounding.
        "eps": 1e-3,
        "clip": 0.3,
    }
