"""The segment-count curriculum: documents that are short for the memory at first, then longer.

A recurrent memory learns to hold something over one segment before it can over many (Bulatov et al.
2022). Samples stay what they are, in order and in compute; only where the memory begins anew
changes.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from train.settings.config import Config


def segment_limit(config: Config, step: int) -> int | None:
    """Return the segments after which memories begin anew at this step; None: documents are whole.

    A function of the configuration and the step alone: the same on all ranks, and after a resume.
    """
    train = config.train
    segments = next((stage.segments for stage in train.curriculum if step < stage.until), None)
    if segments is None or not train.curriculum_vary:
        return segments
    digest = hashlib.sha256(f"{config.seed}:curriculum:{step}".encode()).digest()
    return 1 + int.from_bytes(digest[:8], "big") * segments // 2**64


def cut_documents(starts: Tensor, limit: int | None) -> Tensor:
    """Return starts [B, N] of a sample with one at its beginning and after every limit segments."""
    if limit is None:
        return starts
    places = torch.arange(starts.shape[1], device=starts.device)
    return starts | (places % limit == 0)
