"""Between a running training and the tensors of a checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.documents import Documents
from model.config import HmtMemory
from model.decoder import Decoder
from model.memory.base import Axes, Carried, compact, named_axes, named_tensors
from parallel.mesh import Mesh
from parallel.tensor import cut_of
from train.build import Built, to_compute_config, to_model_config
from train.checkpoints.folder import BadCheckpoint, Manifest, choose_checkpoint
from train.checkpoints.stored import Part, Place, Stored
from train.loop import TrainState
from train.settings.config import Config, apply_overrides, parse_overrides, validate

PACKAGES = ("torch", "megatron-core", "deepspeed", "longhaul")


def collect(built: Built, mesh: Mesh, state: TrainState, config: Config) -> dict[str, Tensor]:
    """Return this rank's share of everything that training goes on from, by name (see Stored)."""
    tensors = {
        f"{kind}/{fragment.name}@{fragment.start}": values
        for fragment in built.engine.fragments()
        for kind, values in fragment.values.items()
    }
    for index, carried in state.memory.items():
        memory = compact(carried)
        lane = lanes_of(config, mesh, index).start
        axes = named_axes(memory, "memory")
        tensors |= {
            f"{name}@{lane}": tensor
            for name, tensor in named_tensors(memory, "memory").items()
            if _is_mine(axes[name], mesh)
        }
    if state.passed is not None and mesh.rank == 0:
        tensors |= named_tensors(state.passed, "passed")
    tensors["random/cpu"] = torch.get_rng_state()
    if mesh.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(mesh.device)
    return tensors


def _is_mine(axes: Axes, mesh: Mesh) -> bool:
    """Return whether this rank saves a tensor: of those that are alike, the first rank's."""
    return (axes.heads is not None or not mesh.tp_rank) and (
        axes.tokens is not None or not mesh.cp_rank
    )


def lanes_of(config: Config, mesh: Mesh, index: int) -> range:
    """Return the lanes of this rank's micro-batch."""
    count = config.train.micro_batch
    first = mesh.dp_rank * (config.train.batch_size // mesh.dp) + index * count
    return range(first, first + count)


def restore(
    built: Built, mesh: Mesh, config: Config, stored: Stored, say: Callable[[str], None]
) -> TrainState:
    """Put a checkpoint of any layout into the model and its optimizer; return its training state.

    Raises BadCheckpoint where it is not one of this model.
    """
    manifest = stored.manifest
    _restore_weights(built, mesh, stored)
    built.engine.restore(manifest.updates)
    _restore_random(mesh, stored)
    state = TrainState(
        manifest.step,
        skipped=manifest.nonfinite,
        updates=int(manifest.updates),
        rollbacks=manifest.rollbacks,
        rolled_back=manifest.rolled_back,
    )
    template = empty_state(built.model)
    if stored.has_memory:
        here = Place(mesh.tp, mesh.tp_rank, mesh.cp, mesh.cp_rank, config.parallel.layout)
        for index in range(config.train.batch_size // mesh.dp // config.train.micro_batch):
            lanes = lanes_of(config, mesh, index)
            state.memory[index] = stored.memory(template, lanes, here)
    state.passed = stored.passed(built.model.memory.handed_on(template))
    if manifest.layout != layout_of(config, mesh):
        say(f"saved as {_words(manifest.layout)}, goes on as {_words(layout_of(config, mesh))}")
    return state


def _words(layout: Mapping[str, int]) -> str:
    return " ".join(f"{name} {value}" for name, value in layout.items())


def _restore_weights(built: Built, mesh: Mesh, stored: Stored) -> None:
    cuts = {name: cut_of(parameter) for name, parameter in built.model.named_parameters()}
    for name, parameter in built.model.named_parameters():
        shape = cuts[name].whole_shape(shape_of(parameter), mesh.tp)
        if name not in stored.manifest.parameters:
            raise BadCheckpoint(f"{stored.checkpoint} has no {name}")
        if stored.whole_shape(name) != shape:
            raise BadCheckpoint(
                f"{stored.checkpoint}: {name} is {list(stored.whole_shape(name))},"
                f" the model's is {list(shape)}"
            )
    for fragment in built.engine.fragments():
        name, stop = fragment.name, fragment.start + fragment.numel
        wanted = Part(cuts[name], mesh.tp, mesh.tp_rank, slice(fragment.start, stop))
        for kind, values in fragment.values.items():
            if stored.manifest.updates == 0 and not stored.has(kind, name):
                values.zero_()  # imported weights have no moments
            else:
                values.copy_(stored.part(kind, name, wanted))


def _restore_random(mesh: Mesh, stored: Stored) -> None:
    state = stored.random("cpu", mesh.rank)
    if state is not None:
        torch.set_rng_state(state)
    on_gpu = stored.random("cuda", mesh.rank)  # absent where a CPU run goes on with GPUs
    if mesh.device.type == "cuda" and on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, mesh.device)


def shape_of(parameter: torch.nn.Parameter) -> torch.Size:
    """Return a parameter's shape on this rank; under ZeRO 3 it is empty itself between uses."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def describe(
    config: Config,
    built: Built,
    mesh: Mesh,
    state: TrainState,
    data: Documents,
    parent: dict[str, Any] | None,
) -> Manifest:
    """Return the manifest of a checkpoint taken now, but for its files.

    data: what the run trains on. parent: where a fork comes from.
    """
    parameters = {}
    for name, parameter in built.model.named_parameters():
        cut, shape = cut_of(parameter), list(shape_of(parameter))
        parameters[name] = {"shape": shape, "dim": cut.dim, "stride": cut.stride}
    return Manifest(
        step=state.step,
        position=state.step * config.train.batch_size,
        updates=state.updates,
        nonfinite=state.skipped,
        layout=layout_of(config, mesh),
        config=config.model_dump(mode="json"),
        data=data.fingerprint,
        vocab_size=built.model.config.vocab_size,
        parameters=parameters,
        versions={"python": platform.python_version()}
        | {package: metadata.version(package) for package in PACKAGES},
        files={},
        parent=parent,
        rollbacks=state.rollbacks,
        rolled_back=state.rolled_back,
        tokenizer_sha256=data.tokenizer_sha256,
    )


def read_model(folder: Path, changes: Iterable[str] = ()) -> tuple[Decoder, Config]:
    """Return a checkpoint's model, whole and in float32 on this process, and its configuration.

    folder: a checkpoint, or a run for its newest good one. changes: `key=value` of the memory, for
    what it may do otherwise than in training (`retrieve=4`, `beta=8`). Raises ValueError where
    there is no checkpoint, or it has no such key.
    """
    return load_model(*choose_checkpoint(folder), changes)


def read_config(path: Path, manifest: Manifest, changes: Iterable[str] = ()) -> Config:
    """Return the configuration of a checkpoint that was chosen, changed as read_model says."""
    overrides = parse_overrides(f"model.memory.{change}" for change in changes)
    return validate(apply_overrides(manifest.config, overrides), source=str(path / "manifest.json"))


def load_model(
    path: Path,
    manifest: Manifest,
    changes: Iterable[str] = (),
    device: torch.device | None = None,
) -> tuple[Decoder, Config]:
    """Return the model of a checkpoint that was chosen, and its configuration; see read_model.

    device: None takes a GPU where there is one.
    """
    config = read_config(path, manifest, changes)
    with torch.device("meta"):
        model_config = to_model_config(config, manifest.vocab_size)
        memory = model_config.memory
        if isinstance(memory, HmtMemory) and manifest.step < (memory.search_from or 0):
            model_config = replace(model_config, memory=replace(memory, search_from=None))
        # weights are read as float32, whose products FP8 is not for
        model = Decoder(model_config, compute=replace(to_compute_config(config), fp8=False))
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to_empty(device=device)
    stored = Stored(path, manifest)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            saved = stored.whole(name) if name in manifest.parameters else None
            if saved is None or saved.shape != parameter.shape:
                raise ValueError(
                    f"{path} has no {name} of {list(parameter.shape)}: a change of the memory that"
                    " changes its parameters; only what has none, such as retrieve or beta, can be"
                    " changed after training"
                )
            parameter.copy_(saved)
    return model.eval(), config


def layout_of(config: Config, mesh: Mesh) -> dict[str, int]:
    """Return what decides which rank holds what."""
    return {"tp": mesh.tp, "cp": mesh.cp, "dp": mesh.dp, "zero": config.parallel.zero}


def empty_state(model: Decoder) -> Carried:
    """Return the state of one stream that has read nothing: a template of names and types."""
    token = torch.zeros((1, 1, 1), dtype=torch.int64, device=next(model.parameters()).device)
    starts = torch.ones_like(token[..., 0], dtype=torch.bool)
    return model.empty(model.segments(token.expand(1, 1, 2), starts, fresh=True))
