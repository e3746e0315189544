"""`longhaul export`: a checkpoint of any layout as a folder that `transformers` loads.

What their format has a place for is written as a Llama, Mistral or Qwen2 model; a memory's own
parameters stand beside it, see memory_files. Adapters are merged into the weights. One parameter is
in memory at a time, and the one that was cut last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from train.build import to_model_config
from train.checkpoints.folder import Manifest, choose_checkpoint
from train.checkpoints.merged import MergedWeights
from train.checkpoints.tensor_file import Spec, write_tensors
from train.huggingface.example import readme
from train.huggingface.folder import INDEX, SINGLE, parameter_shapes
from train.huggingface.importing import new_folder
from train.huggingface.memory_files import MEMORY, MEMORY_TENSORS, memory_values
from train.huggingface.shapes import config_values
from train.huggingface.tensors import Parameter, Piece, pieces_of
from train.huggingface.tokenizer_files import (
    Words,
    exported_words,
    longest,
    require_ids,
    require_same_tokenizer,
    special_ids,
    write_json,
    write_words,
)
from train.settings.config import Config, validate
from train.settings.memories import window_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


class Exported(NamedTuple):
    """What was written."""

    output: Path
    checkpoint: Path
    files: int  # of the standard format's weights
    total_bytes: int
    memory: int  # parameters beside them


class _Source:
    """The tensors to write, each cut out of a parameter of the checkpoint, adapters merged."""

    def __init__(
        self, checkpoint: Path, manifest: Manifest, parts: Mapping[str, Parameter]
    ) -> None:
        self.weights, self.parts = MergedWeights(checkpoint, manifest), parts
        self.homes = {piece.name: name for name, part in parts.items() for piece in part.pieces}
        self.last: tuple[str, dict[str, Tensor]] = ("", {})

    def __getitem__(self, piece: str) -> Tensor:
        """Return a tensor, float32."""
        name = self.homes[piece]
        part = self.parts[name]
        if self.last[0] == name:
            return self.last[1][piece]
        cut = part.split(self.weights[name])
        found = {piece.name: tensor for piece, tensor in zip(part.pieces, cut, strict=True)}
        if len(found) > 1:
            self.last = (name, found)
        return found[piece]


def export(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str = "bf16",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: str | None = None,
) -> Exported:
    """Write a checkpoint, or a run's newest good one, into output, which must hold nothing yet.

    dtype: of the standard format's weights (bf16, fp32); a memory's stay float32. tokenizer: a file
    or folder, `none`, or None for the run's own. Raises ValueError for what the user can mend; then
    nothing is left behind.
    """
    folder, manifest = choose_checkpoint(checkpoint)
    config = validate(manifest.config, source=str(folder / "manifest.json"))
    model = replace(to_model_config(config, manifest.vocab_size), lora=None)
    parts = pieces_of(model, parameter_shapes(model))
    words = exported_words(folder, config, tokenizer)
    if words is not None:
        require_ids(words.tokenizer, model.vocab_size)
        given = "the run's data were prepared with" if tokenizer is None else f"{tokenizer} is"
        remedy = "name the model's own by"
        require_same_tokenizer(folder, manifest, words.tokenizer.sha256, given, remedy)
    source = _Source(folder, manifest, parts)
    pieces = [piece for part in parts.values() for piece in part.pieces]
    base = [piece for piece in pieces if not piece.of_memory]
    memory = [piece for piece in pieces if piece.of_memory]
    with new_folder(output) as work:
        shards = _cut(base, DTYPES[dtype], max_shard_bytes)
        _write_base(work, shards, source, DTYPES[dtype])
        _write_settings(work, config, model.vocab_size, words, DTYPES[dtype])
        if config.model.memory.name != "none":
            write_json(work / MEMORY, memory_values(config, manifest))
        if memory:
            specs = {piece.name: Spec(torch.float32, piece.shape) for piece in memory}
            write_tensors(work / MEMORY_TENSORS, specs, source.__getitem__, metadata=_PT)
        (work / "README.md").write_text(readme(config, manifest.step, dtype, words is not None))
    size = DTYPES[dtype].itemsize
    return Exported(
        output,
        folder,
        len(shards),
        sum(torch.Size(piece.shape).numel() for piece in base) * size,
        sum(torch.Size(piece.shape).numel() for piece in memory),
    )


_PT = {"format": "pt"}
"""What transformers wants to read in a file: tensors of PyTorch."""


def _cut(pieces: list[Piece], dtype: torch.dtype, limit: int) -> list[list[Piece]]:
    """Return the tensors file by file, in order; a file is larger only for a single tensor."""
    shards: list[list[Piece]] = [[]]
    held = 0
    for piece in pieces:
        size = Spec(dtype, piece.shape).nbytes
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += size
    return shards


def _write_base(work: Path, shards: list[list[Piece]], source: _Source, dtype: torch.dtype) -> None:
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    total = 0
    for name, pieces in zip(names if count > 1 else [SINGLE], shards, strict=True):
        specs = {piece.name: Spec(dtype, piece.shape) for piece in pieces}
        total += sum(spec.nbytes for spec in specs.values())
        write_tensors(work / name, specs, lambda piece: source[piece].to(dtype), metadata=_PT)
    if count > 1:
        places = {
            piece.name: name for name, pieces in zip(names, shards, strict=True) for piece in pieces
        }
        write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _write_settings(
    work: Path, config: Config, vocab_size: int, words: Words | None, dtype: torch.dtype
) -> None:
    seen = (window_of(config.model.memory) + 1) * config.data.segment_len
    special, max_len = special_ids(words), longest(words, seen)
    values = config_values(config.model, vocab_size, max_len)
    # dtype is transformers 5's name, torch_dtype that of the versions before.
    types = {"dtype": _NAMES[dtype], "torch_dtype": _NAMES[dtype]}
    write_json(work / "config.json", values | types | special)
    if words is not None:
        write_words(words, work, max_len)
    if not (work / "generation_config.json").exists():
        write_json(work / "generation_config.json", special)
