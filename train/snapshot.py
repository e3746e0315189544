"""Between a running training and the tensors of a checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import HmtMemory
from model.decoder import Decoder
from model.memory.base import Carried, State, named_parts, named_tensors
from parallel.mesh import Mesh
from parallel.tensor import cut_of
from train.build import Built, to_compute_config, to_model_config
from train.checkpoint import BadCheckpoint, Manifest, MasterWeights, choose_checkpoint
from train.config import Config, apply_overrides, parse_overrides, validate
from train.loop import TrainState

PACKAGES = ("torch", "megatron-core", "deepspeed", "longhaul")


def collect(built: Built, mesh: Mesh, state: TrainState) -> dict[str, Tensor]:
    """Return this rank's share of everything that training goes on from, by name."""
    tensors = {
        f"{kind}/{fragment.name}@{fragment.start}": values
        for fragment in built.engine.fragments()
        for kind, values in fragment.values.items()
    }
    for index, memory in state.memory.items():
        tensors |= named_tensors(memory, f"memory/{index}")
    if state.passed is not None:
        tensors |= named_tensors(state.passed, "passed")
    tensors["random/cpu"] = torch.get_rng_state()
    if mesh.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(mesh.device)
    return tensors


def restore(built: Built, mesh: Mesh, manifest: Manifest, tensors: dict[str, Tensor]) -> TrainState:
    """Put a share back where `collect` took it; return the state it was taken at.

    Raises BadCheckpoint where the share is not one of this model in this layout.
    """
    for fragment in built.engine.fragments():
        for kind, values in fragment.values.items():
            name = f"{kind}/{fragment.name}@{fragment.start}"
            saved = tensors.pop(name, None)
            if saved is None or saved.shape != values.shape:
                raise BadCheckpoint(f"no {name} of {values.numel()} elements in the checkpoint")
            values.copy_(saved)
    built.engine.restore(manifest.updates)
    torch.set_rng_state(tensors.pop("random/cpu"))
    cuda_random = tensors.pop("random/cuda", None)  # absent where a CPU run goes on with GPUs
    if mesh.device.type == "cuda" and cuda_random is not None:
        torch.cuda.set_rng_state(cuda_random, mesh.device)
    state = TrainState(manifest.step, manifest.nonfinite, int(manifest.updates))
    for index in sorted(
        {int(name.split("/")[1]) for name in tensors if name.startswith("memory/")}
    ):
        template = empty_state(built.model)
        state.memory[index] = _fill(template, tensors, f"memory/{index}")
    if any(name.startswith("passed/") for name in tensors):
        start = built.model.memory.handed_on(empty_state(built.model))
        state.passed = _fill(start, tensors, "passed")
    return state


def describe(
    config: Config,
    built: Built,
    mesh: Mesh,
    state: TrainState,
    data: str,
    files: dict[str, dict[str, Any]],
) -> Manifest:
    """Return the manifest of a checkpoint taken now."""
    parameters = {}
    for name, parameter in built.model.named_parameters():
        cut = cut_of(parameter)
        # Under ZeRO 3 the parameter itself is empty between uses.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        parameters[name] = {"shape": list(shape), "dim": cut.dim, "stride": cut.stride}
    return Manifest(
        step=state.step,
        position=state.step * config.train.batch_size,
        updates=state.updates,
        nonfinite=state.skipped,
        layout=layout_of(config, mesh),
        config=config.model_dump(mode="json"),
        data=data,
        vocab_size=built.model.config.vocab_size,
        parameters=parameters,
        versions={"python": platform.python_version()}
        | {package: metadata.version(package) for package in PACKAGES},
        files=files,
    )


def read_model(folder: Path, changes: Iterable[str] = ()) -> tuple[Decoder, Config]:
    """Return a checkpoint's model, whole and in float32 on this process, and its configuration.

    folder: a checkpoint, or a run for its newest good one. changes: `key=value` of the memory, for
    what it may do otherwise than in training (`retrieve=4`, `beta=8`). Raises ValueError where
    there is no checkpoint, or it has no such key.
    """
    return load_model(*choose_checkpoint(folder), changes)


def load_model(
    path: Path, manifest: Manifest, changes: Iterable[str] = ()
) -> tuple[Decoder, Config]:
    """Return the model of a checkpoint that was chosen, and its configuration; see read_model."""
    overrides = parse_overrides(f"model.memory.{change}" for change in changes)
    config = validate(
        apply_overrides(manifest.config, overrides), source=str(path / "manifest.json")
    )
    with torch.device("meta"):
        model_config = to_model_config(config, manifest.vocab_size)
        memory = model_config.memory
        if isinstance(memory, HmtMemory) and manifest.step < (memory.search_from or 0):
            model_config = replace(model_config, memory=replace(memory, search_from=None))
        model = Decoder(model_config, compute=to_compute_config(config))
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    weights = MasterWeights(path, manifest)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            saved = weights[name] if name in manifest.parameters else None
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


def _fill(template: State, tensors: dict[str, Tensor], prefix: str) -> State:
    """Return a state shaped as the template with the tensors named under prefix."""
    if isinstance(template, Tensor):
        if prefix not in tensors:
            raise BadCheckpoint(f"no {prefix} in the checkpoint: saved with another memory")
        # another type where train.precision was changed; a store of blocks stays on the host
        # Another type where train.precision was changed; some memories keep a part on the host.
        return tensors[prefix].to(template.device, template.dtype)
    filled = {n: _fill(part, tensors, f"{prefix}/{n}") for n, part in named_parts(template)}
    if isinstance(template, dict):
        return filled
    values = filled.values()
    return list(values) if isinstance(template, list) else type(template)(*values)
