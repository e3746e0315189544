"""How many weights a rank holds: counted on the model itself, without memory for them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from model.config import ModelConfig
from model.decoder import Decoder
from model.local import LocalLinears


class Weights(NamedTuple):
    """Elements of parameters, of the whole model."""

    cut: int  # that tensor-parallel ranks share
    whole: int  # that each of them holds
    trained_cut: int
    trained_whole: int
    largest: int  # of the parameters that are cut
    blocks: int  # of all layers, without embedding and head

    def held(self, tp: int) -> int:
        """Return those of one tensor-parallel rank."""
        return self.cut // tp + self.whole

    def trained(self, tp: int) -> int:
        """Return those of them that learn."""
        return self.trained_cut // tp + self.trained_whole

    @property
    def total(self) -> int:
        """Return those of the model."""
        return self.cut + self.whole


class _Marking(LocalLinears):
    """Whole linear maps that note which of their parameters tensor parallelism cuts."""

    def __init__(self) -> None:
        self.cut: set[int] = set()
        self.kept: list[nn.Parameter] = []  # alive, so that no id is given twice

    def column(self, in_features: int, out_features: int, **how: Any) -> nn.Module:
        return self._mark(super().column(in_features, out_features, **how))

    def row(self, in_features: int, out_features: int, **how: Any) -> nn.Module:
        return self._mark(super().row(in_features, out_features, **how))

    def embedding(self, num_embeddings: int, features: int) -> nn.Module:
        return self._mark(super().embedding(num_embeddings, features))

    def per_head(self, *shape: int) -> nn.Parameter:
        parameter = super().per_head(*shape)
        self._note(parameter)
        return parameter

    def _mark(self, layer: nn.Module) -> nn.Module:
        for parameter in layer.parameters():
            self._note(parameter)
        return layer

    def _note(self, parameter: nn.Parameter) -> None:
        self.cut.add(id(parameter))
        self.kept.append(parameter)


@functools.cache
def count_weights(model: ModelConfig) -> Weights:
    """Return the parameters of a model, by who holds them."""
    linears = _Marking()
    with torch.device("meta"):
        decoder = Decoder(model, linears=linears)
    counts = {(cut, trained): 0 for cut in (True, False) for trained in (True, False)}
    largest = 0
    for parameter in decoder.parameters():
        cut = id(parameter) in linears.cut
        counts[cut, parameter.requires_grad] += parameter.numel()
        largest = max(largest, parameter.numel() if cut else 0)
    return Weights(
        cut=counts[True, True] + counts[True, False],
        whole=counts[False, True] + counts[False, False],
        trained_cut=counts[True, True],
        trained_whole=counts[False, True],
        largest=largest,
        blocks=sum(parameter.numel() for parameter in decoder.blocks.parameters()),
    )
