"""Published speeds on one basis: causal, and nothing counted twice."""

from __future__ import annotations

from typing import Literal, NamedTuple

from model.config import ModelConfig
from model.init import count_parameters
from train.speed.metrics import FORMULA_NAME, Peak, training_flops_per_token

Basis = Literal["causal", "full", "6n"]
BASES: dict[Basis, str] = {
    "causal": f"{FORMULA_NAME}: longhaul's own",
    "full": "attention as a whole square (PaLM, appendix B; Megatron-LM, torchtitan, llm-foundry)",
    "6n": "6 x parameters, without attention (Kaplan et al. 2020)",
}
RECOMPUTED = 4 / 3
"""Forward, forward again and backward, where three thirds are counted."""


class Converted(NamedTuple):
    """One figure in all forms, of one GPU."""

    tokens_per_s: float
    theirs_flops: float  # FLOP/s by the published basis
    ours_flops: float
    theirs_mfu: float
    ours_mfu: float


def flops_per_token(
    model: ModelConfig, segment_len: int, basis: Basis, *, recomputed: bool = False
) -> float:
    """Return the FLOPs of one token in training, as a basis counts them.

    recomputed: whether the forward that activation checkpointing repeats is counted, too.
    """
    if basis == "causal":
        flops = training_flops_per_token(model, segment_len)
    elif basis == "full":
        whole = segment_len * (1.0 + model.window)
        flops = training_flops_per_token(model, segment_len, whole)
    else:
        flops = 6.0 * count_parameters(model)
    return flops * RECOMPUTED if recomputed else flops


def convert(
    model: ModelConfig,
    segment_len: int,
    peak: Peak,
    basis: Basis,
    *,
    recomputed: bool = False,
    tokens_per_s: float | None = None,
    tflops: float | None = None,
    mfu: float | None = None,
) -> Converted:
    """Return one published figure, of one GPU, in all forms.

    tokens_per_s, tflops (10^12 FLOP/s by the basis) or mfu (a share of the peak): one of them.
    Raises ValueError where there is none or more than one.
    """
    given = [value for value in (tokens_per_s, tflops, mfu) if value is not None]
    if len(given) != 1 or given[0] <= 0:
        raise ValueError(
            "give one figure above 0: --tokens-per-s of one GPU, --tflops or --mfu by the basis"
        )
    if mfu is not None and mfu > 1:
        hint = f"; did you mean {mfu / 100:g}?" if mfu <= 100 else ""
        raise ValueError(f"--mfu {mfu:g} is above 1, and it is a share of the peak{hint}")
    theirs = flops_per_token(model, segment_len, basis, recomputed=recomputed)
    ours = flops_per_token(model, segment_len, "causal")
    if tokens_per_s is None:
        reached = tflops * 1e12 if tflops is not None else (mfu or 0.0) * peak.flops_per_s
        tokens_per_s = reached / theirs
    return Converted(
        tokens_per_s,
        tokens_per_s * theirs,
        tokens_per_s * ours,
        tokens_per_s * theirs / peak.flops_per_s,
        tokens_per_s * ours / peak.flops_per_s,
    )
