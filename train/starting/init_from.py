"""`model.init_from`: a new run starts from another checkpoint's weights, whatever its layout.

What the checkpoint lacks may only be the memory's: it starts from the seed. Adapters there are
merged into the weights; those of the new run begin as no change. Optimizer, step and data begin
anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from model.config import ModelConfig
from model.decoder import Decoder
from model.lora import is_adapter, is_memory
from parallel.mesh import Mesh
from parallel.tensor import Cut, cut_of
from train.build import to_model_config
from train.checkpoints.folder import (
    BadCheckpoint,
    Manifest,
    list_checkpoints,
    read_manifest,
    verify_together,
)
from train.checkpoints.merged import MergedWeights
from train.settings.config import Config, ConfigError, validate
from train.settings.memories import find_memory

FIELD = "model.init_from"

OWN_RULES = ("vocab_size", "memory", "lora", "init_std")
"""Of a model: what has a rule of its own, or no meaning after the start."""

TOLD = ("norm_eps", "rope_")
"""Beginnings of what may differ, to read further than the checkpoint could; a difference is said,
for the weights were trained with the other."""


class Start(NamedTuple):
    """A checkpoint that a run starts from."""

    path: Path
    manifest: Manifest
    model: ModelConfig


def find_start(
    config: Config, vocab_size: int, problems: list[tuple[str, str]], *, fresh: bool
) -> Start | None:
    """Return the checkpoint that a new run starts from, hashes not yet compared; None without one.

    Adds to problems (field, message) for all that keeps the model from starting there. vocab_size:
    what the data needs. fresh: the run folder is about to be set aside.
    """
    folder, lora = config.model.init_from, config.model.lora
    if folder is None:
        if lora is not None:
            problems.append(
                (
                    "model.lora",
                    f"rank {lora.rank}, but no model.init_from: the frozen weights would be random"
                    " numbers; give a checkpoint, or leave model.lora out",
                )
            )
        return None
    try:
        start = _open(folder)
    except (BadCheckpoint, ValueError) as error:
        problems.append((FIELD, " ".join(str(error).split())))
        return None
    if fresh and start.path.resolve().is_relative_to(config.run_dir.resolve()):
        problems.append(
            (
                FIELD,
                f"{folder} lies in this run's own folder, which --fresh sets aside; give the new"
                " run another name or run_dir",
            )
        )
    ours = to_model_config(config, vocab_size)
    found = _other_fields(config, ours, start)
    problems += found or _other_shapes(ours, start)
    return start


def _open(folder: Path) -> Start:
    """Raise ValueError or BadCheckpoint where folder is neither a checkpoint nor a run with one."""
    path = folder
    if not (folder / "manifest.json").exists():
        saved = list_checkpoints(folder / "checkpoints")
        if not saved:
            raise ValueError(_nothing_in(folder))
        path = saved[-1]
    manifest = read_manifest(path)
    config = validate(manifest.config, source=str(path / "manifest.json"))
    return Start(path, manifest, to_model_config(config, manifest.vocab_size))


def _nothing_in(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}; give a checkpoint, or a run folder for its newest"
    if (folder / "config.json").exists():
        return f"{folder} is a Hugging Face folder; `longhaul import` makes a checkpoint of it"
    return (
        f"{folder} is no checkpoint (no manifest.json), and no run with one (no"
        " checkpoints/step-*); give one such as runs/NAME/checkpoints/step-00001000"
    )


def _other_fields(config: Config, ours: ModelConfig, start: Start) -> list[tuple[str, str]]:
    """Return what of the model is another one, by its keys."""
    problems = []
    for name, here, there in _differences(ours, start.model):
        if not name.startswith(TOLD):
            text = f"{here}, but {start.path} has {there}; set it to {there}"
            problems.append((f"model.{name}", text))
    here, there = ours.vocab_size, start.model.vocab_size
    landmark = find_memory(config.model.memory, "landmark") is not None
    if here != there and not (landmark and here == there + 1):
        remedy = "prepare the data with the tokenizer of that run"
        if here < there:
            remedy += f"; if it was, set model.vocab_size={there}"
        problems.append(("model.vocab_size", f"{here}, but {start.path} has {there}; {remedy}"))
    return problems


def _differences(ours: ModelConfig, theirs: ModelConfig) -> list[tuple[str, object, object]]:
    """Return (field, here, there) of what is not the same."""
    names = [field.name for field in fields(ModelConfig) if field.name not in OWN_RULES]
    found = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    return [(name, here, there) for name, here, there in found if here != there]


def _other_shapes(ours: ModelConfig, start: Start) -> list[tuple[str, str]]:
    """Return a problem where parameters outside the memory are not the same ones."""
    with torch.device("meta"):
        model = Decoder(ours)
    tp = start.manifest.layout["tp"]
    here = {n: p.shape for n, p in model.named_parameters() if not is_adapter(n)}
    there = {
        name: Cut(entry["dim"], entry["stride"]).whole_shape(torch.Size(entry["shape"]), tp)
        for name, entry in start.manifest.parameters.items()
        if not is_adapter(name)
    }
    wrong = []
    for name in sorted(here.keys() | there.keys()):
        if name in here and name in there:
            if here[name] != there[name]:
                wrong.append(f"{name} is {list(there[name])} there and {list(here[name])} here")
        elif not is_memory(name):
            wrong.append(f"{name} is missing {'there' if name in here else 'here'}")
    if not wrong:
        return []
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    text = (
        f"{start.path} does not fit: {wrong[0]}{more}. Its memory is {start.model.memory.name},"
        f" here it is {ours.memory.name}: use the same sizes of it, or one that leaves the"
        " model's own weights as they are, such as fam"
    )
    return [(FIELD, text)]


def verify_start(config: Config, start: Start) -> None:
    """Compare the checkpoint's hashes, each rank its share of the files.

    Raises ConfigError on all ranks where one found a file that is not as written.
    """
    try:
        verify_together(start.path)
    except BadCheckpoint as error:
        older = [path for path in list_checkpoints(start.path.parent) if path < start.path]
        remedy = f"name an older one, such as {older[-1]}" if older else "name another checkpoint"
        raise ConfigError(config.name, [f"{FIELD}: {error}; {remedy}"]) from None


@torch.no_grad()
def take_weights(model: nn.Module, start: Start, mesh: Mesh) -> None:
    """Copy the checkpoint's weights into the model, this rank's part of each, one at a time.

    Call it before an engine takes the model.
    """
    weights = MergedWeights(start.path, start.manifest)
    known = set(weights.names)
    for name, parameter in model.named_parameters():
        if name in known:
            parameter.copy_(weights.part(name, cut_of(parameter), mesh.tp, mesh.tp_rank))


def describe_start(start: Start, model: Decoder) -> str:
    """Return in one line what came from where, and what begins from the seed."""
    here = [name for name, _ in model.named_parameters()]
    there = [name for name in start.manifest.parameters if not is_adapter(name)]
    new = [name for name in here if name not in there and not is_adapter(name)]
    unused = [name for name in there if name not in here]
    parts = [f"weights from {start.path} (step {start.manifest.step})"]
    if start.model.lora is not None:
        parts.append("its adapters merged into them")
    parts += [f"begun from the seed: {_listed(new)}"] if new else []
    parts += [f"not used: {_listed(unused)}"] if unused else []
    for name, now, was in _differences(model.config, start.model):
        parts.append(f"model.{name} was {was} there, is {now} here")
    return "; ".join(parts)


def _listed(names: Iterable[str]) -> str:
    """Return names with those of all layers as one: blocks.*.mixer.parts.fam.carry.gain."""
    return ", ".join(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))
