"""An exported folder, or any that `longhaul import` takes, as a model with its memory."""

from __future__ import annotations

from pathlib import Path

import torch

from model.decoder import Decoder
from train.build import to_compute_config
from train.huggingface.folder import open_folder
from train.settings.config import Config


def load_folder(folder: str | Path, *, segment_len: int | None = None) -> tuple[Decoder, Config]:
    """Return a folder's model, float32 on the GPU where there is one, and its configuration.

    segment_len: tokens of a segment; None for those it was trained with. Read texts of any length
    by model.stream.Stream. Raises ValueError for a folder that is not such a model.
    """
    source = Path(folder)
    opened = open_folder(source, name="loaded", run_dir=source, segment_len=segment_len)
    with torch.device("meta"):
        model = Decoder(opened.model, compute=to_compute_config(opened.config))
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(opened.weights[name])
    return model.eval(), opened.config
