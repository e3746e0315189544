"""A published folder, opened: its configuration, and our parameters made of its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig
from model.decoder import Decoder
from train.build import to_model_config
from train.huggingface.memory_files import MEMORY_TENSORS, StoredMemory, read_memory
from train.huggingface.shapes import model_keys
from train.huggingface.tensors import Parameter, Piece, pieces_of
from train.settings.config import Config, validate

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_SEGMENT = 4096
"""Segment length of an imported model where none is asked for, or its own limit where lower."""

_TYPES = {"F32", "F16", "BF16"}
_BUFFERS = "rotary_emb.inv_freq"
"""The ending of tensors that older folders hold and nobody reads: they follow from config.json."""


class Opened(NamedTuple):
    """A folder whose every tensor was found to fit."""

    config: Config
    model: ModelConfig
    weights: PublishedWeights
    values: dict[str, Any]  # of its config.json
    max_len: int | None  # tokens that it was trained to read


def open_folder(source: Path, *, name: str, run_dir: Path, segment_len: int | None) -> Opened:
    """Return the folder's model as a configuration of ours, and its weights, none read yet.

    segment_len: None for the shortest of LONGEST_SEGMENT and the model's own limits. Raises
    ValueError with what keeps the folder from being read as a model of ours.
    """
    where = source / "config.json"
    values = _read_values(source, where)
    memory = read_memory(source)
    raw = _configuration(model_keys(values, where), memory, name, run_dir)
    limits = [values.get("max_position_embeddings"), raw["model"]["sliding_window"]]
    shortest = min([LONGEST_SEGMENT, *(limit for limit in limits if isinstance(limit, int))])
    stored = memory.segment_len if memory is not None else None
    length = segment_len or stored or shortest // 2 * 2
    raw["data"] |= {"segment_len": length, "sample_len": length}
    config = validate(raw, source=str(where))
    model = to_model_config(config, config.model.vocab_size or 0)
    parameters = pieces_of(model, parameter_shapes(model))
    weights = PublishedWeights(source, parameters, tied=model.tie_embeddings)
    return Opened(config, model, weights, values, limits[0])


def parameter_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Return the shapes of a model's parameters, whole, by name."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Decoder(model).named_parameters()}


def _read_values(source: Path, where: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise ValueError(
            f"{source} is no folder; download the model first, as `hf download NAME --local-dir"
            " FOLDER` does, and name that folder"
        )
    try:
        values = json.loads(where.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{where} cannot be read ({error}); a model's folder has config.json, safetensors and"
            " tokenizer.json"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds no JSON object; take the config.json of the weights")
    return values


def _configuration(
    model: dict[str, Any], memory: StoredMemory | None, name: str, run_dir: Path
) -> dict[str, Any]:
    """Return a configuration that only reads: data and training are the least that is valid."""
    return {
        "name": name,
        "run_dir": str(run_dir),
        "model": model | {"memory": memory.keys if memory is not None else {"name": "none"}},
        "data": {"train": str(run_dir / "data/train"), "valid": str(run_dir / "data/valid")},
        "train": {"steps": 1, "batch_size": 1, "lr": 1e-5},
    }


class PublishedWeights:
    """Our parameters, float32, each made of the folder's tensors when it is asked for."""

    def __init__(self, folder: Path, parameters: Mapping[str, Parameter], *, tied: bool) -> None:
        self.folder, self.parameters = folder, parameters
        self.places = _places(folder)  # tensor -> file
        pieces = [piece for parameter in parameters.values() for piece in parameter.pieces]
        if any(piece.of_memory for piece in pieces):
            path = folder / MEMORY_TENSORS
            self.places |= dict.fromkeys(_names(path), path)
        problems = self._problems(pieces, tied)
        if problems:
            first = problems[:8] + [f"and {len(problems) - 8} more"] * (len(problems) > 8)
            raise ValueError(
                "\n".join([f"{folder} cannot be imported:", *(f"  {p}" for p in first)])
            )

    def __getitem__(self, name: str) -> Tensor:
        """Return a parameter; ValueError where a number in it is not finite."""
        parameter = self.parameters[name]
        tensors = [self._read(piece.name).float() for piece in parameter.pieces]
        for piece, tensor in zip(parameter.pieces, tensors, strict=True):
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{self.places[piece.name]}: {piece.name} holds numbers that are not finite;"
                    " the file was damaged or the model diverged: download it again"
                )
        return parameter.join(tensors)

    def _read(self, name: str) -> Tensor:
        with _opened(self.places[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _problems(self, pieces: list[Piece], tied: bool) -> list[str]:
        """Return what is missing, does not fit, or would be left out."""
        problems = []
        for piece in pieces:
            if piece.name not in self.places:
                problems.append(f"{piece.name} {list(piece.shape)} missing; download it again")
                continue
            with _opened(self.places[piece.name]) as file:
                found = file.get_slice(piece.name)
                shape, kind = found.get_shape(), found.get_dtype()
            if kind not in _TYPES:
                problems.append(
                    f"{piece.name} is {kind}: the weights are quantised or no numbers; import a"
                    f" model of {', '.join(sorted(_TYPES))}"
                )
            elif shape != list(piece.shape):
                problems.append(
                    f"{piece.name} is {shape}, and config.json makes it {list(piece.shape)}; take"
                    " the config.json of these weights"
                )
        extra = self.places.keys() - {piece.name for piece in pieces}
        extra = {name for name in extra if not name.endswith(_BUFFERS)}
        if tied and "lm_head.weight" in extra and not problems:
            extra.remove("lm_head.weight")
            if not torch.equal(*map(self._read, ("lm_head.weight", "model.embed_tokens.weight"))):
                problems.append(
                    "lm_head.weight differs from the embedding, and tie_word_embeddings is true;"
                    " set it to false in config.json"
                )
        return problems + [
            f"{name} has no place in this model; take the config.json of these weights"
            for name in sorted(extra, key=_by_number)
        ]


def _by_number(name: str) -> list[object]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _places(folder: Path) -> dict[str, Path]:
    """Return which file holds each tensor. Raises ValueError where there are none to read."""
    if (folder / SINGLE).exists():
        return dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)
    index = folder / INDEX
    if not index.exists():
        raise ValueError(_no_weights(folder))
    try:
        listed = json.loads(index.read_text())["weight_map"]
        places = {name: folder / file for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read ({error!r}); download it again") from None
    held = {path: _names(path) for path in sorted(set(places.values()))}
    for name, path in places.items():
        if name not in held[path]:
            raise ValueError(f"{index} says that {path.name} holds {name}, and it does not")
    return {name: path for path, names in held.items() for name in names}


def _no_weights(folder: Path) -> str:
    pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    if pickled:
        return (
            f"{folder} holds pickle files ({pickled[0]}), which can run code when they are read;"
            " longhaul reads safetensors only. Where you trust it, rewrite it: AutoModelForCausalLM"
            ".from_pretrained(FOLDER).save_pretrained(ANOTHER) of transformers"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    beside = f" (there is {others[0]}, in another layout)" if others else ""
    return f"{folder} has neither {SINGLE} nor {INDEX}{beside}; download the transformers files"


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        names: list[str] = list(file.keys())
    return names


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again") from None
