"""`Linears` over tensor-parallel ranks, by megatron-core's layers, and who holds what."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.deferred import deferred_product, defers, plain_product
from model.float8 import float8_product, rounded_product
from parallel.float8 import column_product
from parallel.megatron import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from parallel.mesh import Mesh


class _Products:
    """Megatron's products of a map, or with `fp8` those of model.float8."""

    fp8 = False

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Any, **how: Any) -> Tensor:  # noqa: A002
        if defers(weight):
            return self._deferred(input, weight, bias, **how)
        if not self.fp8:
            theirs: Tensor = super()._forward_impl(input, weight, bias=bias, **how)  # type: ignore[misc]
            return theirs
        scattered = how["sequence_parallel"]
        if scattered or how["allreduce_dgrad"]:
            result = column_product(input, weight, how["tp_group"], scattered=scattered)
        else:
            result = float8_product(input, weight)
        return result if bias is None else result + bias

    def _deferred(self, x: Tensor, weight: Tensor, bias: Any, **how: Any) -> Tensor:
        if how["sequence_parallel"]:
            x = gather_from_sequence_parallel_region(x)
        elif how["allreduce_dgrad"]:
            x = copy_to_tensor_model_parallel_region(x)
        result = deferred_product(x, weight, rounded_product if self.fp8 else plain_product)
        return result if bias is None else result + bias


class _Column(_Products, ColumnParallelLinear):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x)[0]
        return result


class _Row(_Products, RowParallelLinear):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x)[0]
        return result


class _Embedding(VocabParallelEmbedding):  # type: ignore[misc]
    def forward(self, tokens: Tensor) -> Tensor:
        # With sequence parallelism megatron transposes [batch, rows, D] and scatters the rows.
        result: Tensor = super().forward(tokens.unsqueeze(0))
        return result.squeeze(1) if self.reduce_scatter_embeddings else result.squeeze(0)


class MegatronLinears:
    """Weights cut over the tensor-parallel group."""

    def __init__(self, mesh: Mesh, *, sequence_parallel: bool, dtype: torch.dtype) -> None:
        self.size, self.rank, self.group = mesh.tp, mesh.tp_rank, mesh.tp_group
        self.sequence_parallel = sequence_parallel and mesh.tp > 1
        self.scattered = mesh.tp if self.sequence_parallel else 1
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=mesh.tp,
            context_parallel_size=mesh.cp,
            sequence_parallel=self.sequence_parallel,
            params_dtype=dtype,
            use_cpu_initialization=mesh.device.type == "cpu",
            # model.init does, the same for every layout; `_marked` sets the marks megatron would.
            perform_initialization=False,
            gradient_accumulation_fusion=False,
        )

    def column(
        self,
        in_features: int,
        out_features: int,
        *,
        stride: int = 1,
        bias: bool = False,
        fp8: bool = False,
    ) -> nn.Module:
        """Return a column-parallel linear map."""
        layer = _Column(
            in_features,
            out_features,
            config=self.config,
            init_method=_leave,
            bias=bias,
            stride=stride,
        )
        layer.fp8 = fp8
        return _marked(layer, 0, stride)  # megatron marks the bias by itself

    def row(self, in_features: int, out_features: int, *, fp8: bool = False) -> nn.Module:
        """Return a row-parallel linear map without bias."""
        layer = _Row(
            in_features,
            out_features,
            config=self.config,
            init_method=_leave,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        layer.fp8 = fp8
        return _marked(layer, 1)

    def embedding(self, num_embeddings: int, features: int) -> nn.Module:
        """Return a table cut by its rows."""
        layer = _Embedding(
            num_embeddings,
            features,
            init_method=_leave,
            reduce_scatter_embeddings=self.sequence_parallel,
            config=self.config,
        )
        return _marked(layer, 0)

    def enter(self, x: Tensor) -> Tensor:
        """Return all rows; the gradient is summed over the ranks."""
        if self.sequence_parallel:
            gathered: Tensor = gather_from_sequence_parallel_region(x)
            return gathered
        same: Tensor = copy_to_tensor_model_parallel_region(x)
        return same

    def scatter(self, x: Tensor) -> Tensor:
        """Return this rank's rows of x; all of them without sequence parallelism."""
        if not self.sequence_parallel:
            return x
        mine: Tensor = scatter_to_sequence_parallel_region(x)
        return mine

    def gather(self, x: Tensor) -> Tensor:
        """Return all rows for every rank to hold; each row's gradient is taken from its holder."""
        if not self.sequence_parallel:
            return x
        rows: Tensor = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
        return rows

    def share(self, x: Tensor) -> Tensor:
        """Return all rows; the gradient is summed over the ranks that rows are scattered over."""
        if not self.sequence_parallel:
            return x
        rows: Tensor = gather_from_sequence_parallel_region(x)
        return rows

    def per_head(self, *shape: int) -> nn.Parameter:
        """Return this rank's part of a parameter with one entry a head."""
        part = nn.Parameter(
            torch.empty(shape[0] // self.size, *shape[1:], dtype=self.config.params_dtype)
        )
        set_tensor_model_parallel_attributes(part, True, 0, 1)
        return part

    def parts(self, x: Tensor) -> Tensor:
        """Return every rank's x."""
        stacked = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(stacked, x.contiguous(), group=self.group)
        return stacked.view(self.size, *x.shape)


def _leave(weight: Tensor) -> None:
    """Initialise nothing: model.init does, the same for every layout."""


def _marked(layer: nn.Module, dim: int, stride: int = 1) -> nn.Module:
    """Return a megatron layer with its weight marked as cut, which gradient norms rely on."""
    set_tensor_model_parallel_attributes(layer.weight, True, dim, stride)
    return layer


def sum_scattered_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Under sequence parallelism, sum gradients of parameters that met scattered rows.

    A tensor hook runs once a backward, on the whole gradient of the parameter and before ZeRO takes
    it.
    """

    def total(grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=mesh.tp_group)
        return grad

    for parameter in model.parameters():
        if parameter.requires_grad and getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(total)


class Cut(NamedTuple):
    """How a parameter is cut over tensor-parallel ranks."""

    dim: int | None  # None: every rank holds it whole
    stride: int  # matrices stacked along dim, each cut by itself

    def whole_shape(self, shape: torch.Size, tp: int) -> torch.Size:
        """Return the shape over all ranks of a part's shape."""
        whole = list(shape)
        if self.dim is not None:
            whole[self.dim] *= tp
        return torch.Size(whole)

    def take(self, whole: Tensor, tp: int, tp_rank: int) -> Tensor:
        """Return tp_rank's part of a whole tensor."""
        if self.dim is None:
            return whole
        blocks = whole.chunk(self.stride, self.dim)
        return torch.cat([block.chunk(tp, self.dim)[tp_rank] for block in blocks], self.dim)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Return the whole tensor from every rank's part, in order."""
        if self.dim is None:
            return parts[0]
        blocks = [part.chunk(self.stride, self.dim) for part in parts]
        return torch.cat(
            [blocks[rank][i] for i in range(self.stride) for rank in range(len(parts))],
            self.dim,
        )


def cut_of(parameter: nn.Parameter) -> Cut:
    """Return how a parameter is cut, by the marks megatron-core leaves on it."""
    marked: Any = parameter
    if not getattr(marked, "tensor_model_parallel", False):
        return Cut(None, 1)
    return Cut(int(marked.partition_dim), int(marked.partition_stride))
