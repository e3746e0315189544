"""megatron-core, imported in one place: without Triton where this process sees no GPU.

Megatron imports Triton where it finds it, and so does the compiler of torch that Megatron loads.
It has kernels for GPUs alone, and takes 0.07 GiB of a rank on the CPU.
"""

import torch

from parallel.hidden import hidden

with hidden(*([] if torch.cuda.device_count() else ["triton"])):
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
        set_tensor_model_parallel_attributes,
    )

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "parallel_state",
    "scatter_to_sequence_parallel_region",
    "set_tensor_model_parallel_attributes",
]
