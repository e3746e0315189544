"""From a configuration and a mesh to a model ready to train."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import torch
from torch import nn

from model.attention import Layout, Whole
from model.config import (
    ComputeConfig,
    FamMemory,
    MemoryConfig,
    ModelConfig,
    NoMemory,
    WindowMemory,
)
from model.decoder import Decoder
from model.init import initialise
from model.interfaces import Linears
from model.local import FoldedSequence, LocalLinears
from parallel.mesh import Mesh
from parallel.ring import choose_exchange
from parallel.slicing import choose_layout
from parallel.tensor import MegatronLinears, cut_of, sum_scattered_gradients
from parallel.zero import ZeroEngine
from train.config import Config

MEMORY_CONFIGS: dict[str, type[MemoryConfig]] = {
    "none": NoMemory,
    "window": WindowMemory,
    "fam": FamMemory,
}


class Built(NamedTuple):
    """A model in its layout, with its optimizer."""

    model: Decoder
    engine: ZeroEngine
    layout: Layout


def to_model_config(config: Config, vocab_size: int) -> ModelConfig:
    """Return the model package's own description of a configuration's model.

    vocab_size: of the prepared data, where the configuration leaves it out.
    """
    section = config.model
    known = {field.name for field in fields(ModelConfig)} - {"memory", "vocab_size", "head_dim"}
    memory = MEMORY_CONFIGS[section.memory.name]
    taken = {field.name for field in fields(memory)}
    return ModelConfig(
        **{name: getattr(section, name) for name in known},
        vocab_size=section.vocab_size or vocab_size,
        head_dim=section.head_dim or section.hidden_size // section.num_heads,
        memory=memory(**section.memory.model_dump(include=taken)),
    )


def to_compute_config(config: Config) -> ComputeConfig:
    """Return what is recomputed, and in what pieces."""
    train = config.train
    return ComputeConfig(train.checkpointing, train.loss_chunk, train.ffn_chunk)


def build(config: Config, model_config: ModelConfig, mesh: Mesh) -> Built:
    """Return the model of this rank, its initial weights the same for every layout."""
    parallel = config.parallel
    layout: Layout = Whole()
    sequence = FoldedSequence()
    if mesh.cp > 1:
        layout = choose_layout(parallel.layout, mesh.cp)
        sequence = FoldedSequence(layout, choose_exchange(parallel.attention, mesh.cp_group))
    linears: Linears = LocalLinears()
    if mesh.tp > 1:
        linears = MegatronLinears(
            mesh, sequence_parallel=parallel.sequence_parallel, dtype=torch.float32
        )
    with torch.device(mesh.device):
        model = Decoder(
            model_config, sequence=sequence, linears=linears, compute=to_compute_config(config)
        )
    initialise(
        model,
        model_config,
        config.seed,
        shape=lambda parameter: cut_of(parameter).whole_shape(parameter.shape, mesh.tp),
        take=lambda parameter, whole: cut_of(parameter).take(whole, mesh.tp, mesh.tp_rank),
    )
    if mesh.tp > 1 and parallel.sequence_parallel:
        sum_scattered_gradients(model, mesh)
    engine = ZeroEngine(
        model,
        make_optimizer(model, config),
        mesh,
        stage=parallel.zero,
        bf16=config.train.precision == "bf16",
        clip=config.train.clip,
    )
    return Built(model, engine, layout)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Return AdamW; matrices decay, norms and gains do not."""
    train = config.train
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        fused=True,
    )
