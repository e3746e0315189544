"""From a configuration and a mesh to a model ready to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import nn

from model.attention import Layout
from model.compiled import use_compiled
from model.config import ComputeConfig, LoraConfig, ModelConfig, RopeScaling
from model.decoder import Decoder
from model.float8 import check_float8
from model.init import initialise
from model.interfaces import Linears
from model.local import FoldedSequence, LocalLinears
from parallel.engine import Engine, make_engine
from parallel.mesh import Mesh
from parallel.ring import choose_exchange
from parallel.slicing import layout_of
from parallel.tensor import MegatronLinears, cut_of, sum_scattered_gradients
from train.settings.config import Config
from train.settings.memories import to_memory_config


class Built(NamedTuple):
    """A model in its layout, with its optimizer."""

    model: Decoder
    engine: Engine
    layout: Layout


def to_model_config(config: Config, vocab_size: int) -> ModelConfig:
    """Return the model package's own description of a configuration's model.

    vocab_size: where the configuration leaves it out; see train.reading.landmarks.model_vocab_size.
    """
    section = config.model
    own = {"memory", "vocab_size", "head_dim", "rope_scaling", "lora"}
    known = {field.name for field in fields(ModelConfig)} - own
    return ModelConfig(
        **{name: getattr(section, name) for name in known},
        rope_scaling=RopeScaling(**section.rope_scaling.model_dump()),
        vocab_size=section.vocab_size or vocab_size,
        head_dim=section.head_dim or section.hidden_size // section.num_heads,
        memory=to_memory_config(section.memory),
        lora=None if section.lora is None else LoraConfig(**section.lora.model_dump()),
    )


def to_compute_config(config: Config) -> ComputeConfig:
    """Return what is recomputed, and in what pieces."""
    train = config.train
    return ComputeConfig(
        train.checkpointing,
        train.loss_chunk,
        train.ffn_chunk,
        wavefront=train.wavefront,
        fp8=train.fp8,
    )


def build(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh,
    fill: Callable[[Decoder], None] = lambda model: None,
    *,
    cut_above: int | None = None,
) -> Built:
    """Return the model of this rank, its initial weights the same for every layout.

    fill: called with the model before its engine takes it, to put in other weights. cut_above: see
    ZeroEngine.
    """
    use_compiled(config.train.compile)
    if config.train.fp8:
        check_float8(mesh.device)
    layout = layout_of(config.parallel.layout, mesh.cp)
    model = make_model(config, model_config, mesh, layout)
    initialise(
        model,
        model_config,
        config.seed,
        shape=lambda parameter: cut_of(parameter).whole_shape(parameter.shape, mesh.tp),
        take=lambda parameter, whole: cut_of(parameter).take(whole, mesh.tp, mesh.tp_rank),
    )
    fill(model)
    if mesh.tp > 1 and config.parallel.sequence_parallel:
        sum_scattered_gradients(model, mesh)
    engine = make_engine(
        model,
        make_optimizer(model, config),
        mesh,
        stage=config.parallel.zero,
        bf16=config.train.precision == "bf16",
        clip=config.train.clip,
        cut_above=cut_above,
    )
    return Built(model, engine, layout)


def make_model(config: Config, model_config: ModelConfig, mesh: Mesh, layout: Layout) -> Decoder:
    """Return this rank's part of the model; its weights are not initialised."""
    parallel, sequence = config.parallel, FoldedSequence()
    if mesh.cp > 1:
        sequence = FoldedSequence(layout, choose_exchange(parallel.attention, mesh.cp_group))
    linears: Linears = LocalLinears()
    if mesh.tp > 1:
        linears = MegatronLinears(
            mesh, sequence_parallel=parallel.sequence_parallel, dtype=torch.float32
        )
    with torch.device(mesh.device):
        return Decoder(
            model_config, sequence=sequence, linears=linears, compute=to_compute_config(config)
        )


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Return AdamW of what is trained; matrices decay, norms and gains do not.

    A parameter with an `lr_scale` has a group of that scale, without decay; see Engine.step.
    """
    train = config.train
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        scale: float | None = getattr(parameter, "lr_scale", None)
        kind = (parameter.dim() > 1 and scale is None, 1.0 if scale is None else scale)
        groups.setdefault(kind, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": train.weight_decay if decays else 0.0,
                "lr_scale": scale,
            }
            for (decays, scale), parameters in groups.items()
        ],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        fused=True,
    )
