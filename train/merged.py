"""A checkpoint's weights as one plain model has them: adapters, if there are any, added."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from model.lora import is_adapter, merge_lora
from train.checkpoint import Manifest, MasterWeights


class MergedWeights:
    """Whole float32 weights of a checkpoint of any layout, read one at a time, adapters merged."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self.weights = MasterWeights(checkpoint, manifest)
        self.names = [name for name in manifest.parameters if not is_adapter(name)]
        self.lora = manifest.config["model"].get("lora")  # absent before there was any

    def __getitem__(self, name: str) -> Tensor:
        """Return one of `names`; raises BadCheckpoint where an element is missing."""
        if self.lora is None:
            return self.weights[name]
        return merge_lora(name, self.weights, self.lora["alpha"])
