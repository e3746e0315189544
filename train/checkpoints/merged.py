"""A checkpoint's weights as one plain model has them: adapters, if there are any, added."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from model.lora import is_adapter, merge_lora
from parallel.tensor import Cut
from train.checkpoints.folder import Manifest
from train.checkpoints.stored import MASTER, Part, Stored


class MergedWeights:
    """Whole float32 weights of a checkpoint of any layout, read one at a time, adapters merged."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self.stored = Stored(checkpoint, manifest)
        self.names = [name for name in manifest.parameters if not is_adapter(name)]
        self.lora = manifest.config["model"].get("lora")  # absent before there was any

    def __getitem__(self, name: str) -> Tensor:
        """Return one of `names`; raises BadCheckpoint where an element is missing."""
        if self.lora is None:
            return self.stored.whole(name)
        return merge_lora(name, _Whole(self.stored), self.lora["alpha"])

    def part(self, name: str, cut: Cut, tp: int, tp_rank: int) -> Tensor:
        """Return tp_rank's part of one of `names`; only what it needs is read where it can be."""
        if self.lora is not None:
            return cut.take(self[name], tp, tp_rank)
        shape = list(self.stored.whole_shape(name))
        if cut.dim is not None:
            shape[cut.dim] //= tp
        wanted = Part(cut, tp, tp_rank, slice(0, math.prod(shape)))
        return self.stored.part(MASTER, name, wanted).view(shape)


class _Whole:
    """Whole parameters of a checkpoint by name."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self.stored.whole(name)

    def __contains__(self, name: object) -> bool:
        return name in self.stored.manifest.parameters
