"""What train.fp8 asks of the other fields."""

import math

from model.config import FP8_MULTIPLE as MULTIPLE
from train.settings.remedies import Rule, nearest_multiples


def _precision(fp8: bool, precision: str) -> str | None:
    if not fp8 or precision == "bf16":
        return None
    return (
        f"true rounds the factors of products whose results are bfloat16, and train.precision ="
        f" {precision}; set it to bf16, or leave fp8 out"
    )


def _features(fp8: bool, hidden_size: int, ffn_size: int, tp: int) -> str | None:
    if not fp8:
        return None
    for name, value, of in (
        ("model.hidden_size", hidden_size, MULTIPLE),
        ("model.ffn_size", ffn_size, MULTIPLE * tp),
    ):
        if value % of:
            times = f" * parallel.tp = {of}" if of > MULTIPLE else ""
            return (
                f"true needs features of a multiple of {MULTIPLE} on each rank, and {name} ="
                f" {value} is none of {MULTIPLE}{times}; use {nearest_multiples(value, of)}"
            )
    return None


def _heads(
    fp8: bool, heads: int, kv_heads: int, head_dim: int | None, hidden_size: int, tp: int
) -> str | None:
    dim = head_dim or hidden_size // heads
    if not fp8 or heads % tp or kv_heads % tp or (kv_heads // tp * dim) % MULTIPLE == 0:
        return None
    return (
        f"true needs features of a multiple of {MULTIPLE} on each rank, and num_kv_heads / tp *"
        f" head_dim = {kv_heads} / {tp} * {dim} is none; use a head_dim of a multiple of {MULTIPLE}"
    )


def _abc(fp8: bool, slots: int, kv_heads: int, tp: int) -> str | None:
    """Say where abc asks each key head's projection for a number of slots that does not do."""
    if not fp8 or kv_heads % tp or (kv_heads // tp * slots) % MULTIPLE == 0:
        return None
    least = MULTIPLE // math.gcd(MULTIPLE, kv_heads // tp)
    return (
        f"true needs features of a multiple of {MULTIPLE} on each rank, and abc's slots *"
        f" num_kv_heads / tp = {slots} * {kv_heads} / {tp} is none; use"
        f" {nearest_multiples(slots, least)} slots"
    )


def _wavefront(fp8: bool, wavefront: bool) -> str | None:
    if not fp8 or not wavefront:
        return None
    return "true has no products of many layers at once, which train.wavefront makes; use one"


_FP8, _HIDDEN, _TP = "train.fp8", "model.hidden_size", "parallel.tp"

FP8_RULES: tuple[Rule, ...] = (
    Rule(_FP8, (_FP8, "train.precision"), _precision),
    Rule(_FP8, (_FP8, _HIDDEN, "model.ffn_size", _TP), _features),
    Rule(
        _FP8,
        (_FP8, "model.num_heads", "model.num_kv_heads", "model.head_dim", _HIDDEN, _TP),
        _heads,
    ),
    Rule(_FP8, (_FP8, "model.memory.abc.slots", "model.num_kv_heads", _TP), _abc),
    Rule(_FP8, (_FP8, "train.wavefront"), _wavefront),
)
