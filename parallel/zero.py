"""DeepSpeed ZeRO over DP x CP.

Context parallelism is folded into DeepSpeed's data-parallel group. DeepSpeed averages gradients
over that group while the loss is already divided by the global number of targets, so what is wanted
is the sum: `backward` multiplies the loss by the group's size, and nothing else is scaled anywhere.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from parallel.fragment import Fragment
from parallel.hidden import hidden
from parallel.mesh import Mesh


def load_deepspeed(device: str) -> Any:
    """Return the module DeepSpeed, for device "cpu" or "cuda", imported without mlflow.

    Its autotuner, which nobody runs here, imports mlflow where that is installed: with pandas and
    scipy 0.1 GiB and seconds on every rank. See train/tracking/shipper.py for who does use it.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)
    with hidden("mlflow"):
        import deepspeed
    return deepspeed


class Groups:
    """The mpu that DeepSpeed asks for its groups.

    The `get_sequence_*` names must not exist here: with them DeepSpeed divides by DP alone, and
    gradients come out CP times too large.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_data_parallel_group(self) -> Any:  # noqa: D102
        return self.mesh.zero_group

    def get_data_parallel_world_size(self) -> int:  # noqa: D102
        return self.mesh.zero_size

    def get_data_parallel_rank(self) -> int:  # noqa: D102
        return self.mesh.zero_rank

    def get_data_parallel_group_ranks(self) -> list[int]:  # noqa: D102
        return dist.get_process_group_ranks(self.mesh.zero_group)

    def get_model_parallel_group(self) -> Any:  # noqa: D102
        return self.mesh.tp_group

    def get_model_parallel_world_size(self) -> int:  # noqa: D102
        return self.mesh.tp

    def get_model_parallel_rank(self) -> int:  # noqa: D102
        return self.mesh.tp_rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_tensor_model_parallel_src_rank(self) -> int:  # noqa: D102
        return dist.get_process_group_ranks(self.mesh.tp_group)[0]

    def get_pipeline_model_parallel_world_size(self) -> int:  # noqa: D102
        return 1

    def get_pipeline_model_parallel_rank(self) -> int:  # noqa: D102
        return 0


class ZeroEngine:
    """A model with its optimizer, its states cut over DP x CP: backward, step.

    cut_above: stage 3 keeps parameters of fewer elements whole on every rank (None: DeepSpeed's own
    100,000); a small model wants less, or it has nothing to cut.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        mesh: Mesh,
        *,
        stage: int,
        bf16: bool,
        clip: float,
        cut_above: int | None = None,
    ) -> None:
        self.mesh, self.stage = mesh, stage
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        settings = _config(stage, bf16, clip, cuda=mesh.device.type == "cuda")
        if cut_above is not None:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = cut_above
        self.engine = _start(model, optimizer, mesh, settings)
        self.zero: Any = self.engine.optimizer
        self.base: torch.optim.AdamW = self.zero.optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model forward."""
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of loss, this rank's part of the global mean. last: before `step`."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.mesh.zero_size)

    def step(self, lr: float) -> float | None:
        """Update the weights; return the gradient norm before clipping, over all ranks.

        lr is multiplied by a parameter group's own `lr_scale`, where it has one. Returns None, and
        leaves weights and moments as they were, where a gradient is not finite.
        """
        for group in self.base.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.engine.step()
        if self.zero.overflow:
            return None
        return float(self.engine.get_global_grad_norm())

    @torch.no_grad()
    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's share of master weights and moments, as views, by parameter."""
        for flat, entries in self._flats():
            state = self._moments(flat)
            for name, start, offset, numel in entries:
                values = {"master": flat, "exp_avg": state["exp_avg"]}
                values["exp_avg_sq"] = state["exp_avg_sq"]
                yield Fragment(
                    name, start, {k: v.data.narrow(0, offset, numel) for k, v in values.items()}
                )
        yield from self._frozen_fragments()

    @torch.no_grad()
    def _frozen_fragments(self) -> Iterator[Fragment]:
        """Yield this rank's share of parameters without gradient: equal runs, the last shorter.

        Stages 1 and 2 hold them whole, and stage 3 cuts them so by itself.
        """
        for name, parameter in self.frozen.items():
            whole, size = self._frozen_share(parameter)
            start = self.mesh.zero_rank * size
            numel = min(size, getattr(parameter, "ds_numel", parameter.numel()) - start)
            if numel > 0:
                held = whole.narrow(0, 0 if self.stage == 3 else start, numel)
                yield Fragment(name, start, {"master": held})

    def _frozen_share(self, parameter: Any) -> tuple[Tensor, int]:
        """Return what this rank holds of a frozen parameter, flat, and the length of a share."""
        if self.stage == 3:
            return parameter.ds_tensor.data, parameter.ds_tensor.ds_numel
        flat = parameter.data.view(-1)
        return flat, -(-flat.numel() // self.mesh.zero_size)

    def _gather_frozen(self) -> None:
        """Complete frozen parameters from all ranks' shares (stages 1 and 2)."""
        for parameter in self.frozen.values():
            flat, size = self._frozen_share(parameter)
            start = self.mesh.zero_rank * size
            mine, shares = flat[start : start + size], flat.new_empty(self.mesh.zero_size, size)
            padded = functional.pad(mine, (0, size - mine.numel()))
            dist.all_gather(list(shares.unbind()), padded, group=self.mesh.zero_group)
            flat.copy_(shares.view(-1)[: flat.numel()])

    def optimizer_step_count(self) -> float:
        """Return how many updates the moments have seen."""
        for flat, _ in self._flats():
            return float(self._moments(flat)["step"])
        return 0.0

    @torch.no_grad()
    def restore(self, step_count: float) -> None:
        """Call after copying into `fragments`: weights follow the masters, moments their count."""
        for flat, _ in self._flats():
            self._moments(flat)["step"].fill_(step_count)
        if self.stage == 3:
            flats = zip(
                self.zero.fp16_partitioned_groups_flat,
                self.zero.fp32_partitioned_groups_flat,
                strict=True,
            )
            for weights, master in flats:
                weights.data.copy_(master.data)
            # Small parameters stay gathered on every rank: gather them anew from the shares.
            for parameter in self.zero.persistent_parameters:
                parameter.partition(has_been_updated=False)
            if self.zero.persistent_parameters:
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
        else:
            self.zero.update_lp_params()
            self._gather_frozen()

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        """Return AdamW's state of a flat partition; before the first step zeros, as it makes it."""
        state: dict[str, Tensor] = self.base.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state["exp_avg"] = torch.zeros_like(flat)
            state["exp_avg_sq"] = torch.zeros_like(flat)
        return state

    def _flats(self) -> Iterator[tuple[Tensor, list[tuple[str, int, int, int]]]]:
        """Yield each flat float32 partition with its (name, start, offset, numel) entries."""
        groups = self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups
        for index, parameters in enumerate(groups):
            entries = []
            for parameter in parameters:
                entry = self._entry_3(parameter) if self.stage == 3 else _entry_12(parameter)
                if entry is not None:
                    entries.append((self.names[id(parameter)], *entry))
            if self.stage == 3:
                yield self.zero.fp32_partitioned_groups_flat[index], entries
            else:
                yield self.zero.single_partition_of_fp32_groups[index], entries

    def _entry_3(self, parameter: Any) -> tuple[int, int, int] | None:
        _, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = self.mesh.zero_rank * size
        numel = min(size, parameter.ds_numel - start)
        return (start, offset, numel) if numel > 0 else None


def _entry_12(parameter: Any) -> tuple[int, int, int] | None:
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return here.start, there.start, here.numel


def _config(stage: int, bf16: bool, clip: float, *, cuda: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": cuda,
            "round_robin_gradients": False,
        },
        "steps_per_print": None,
    }
    if bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        # Several backwards make one step (windows, micro-batches): bfloat16 sums would lose them.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def _start(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    mesh: Mesh,
    config: dict[str, Any],
) -> Any:
    deepspeed = load_deepspeed(mesh.device.type)
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    class Engine(DeepSpeedEngine):  # type: ignore[misc]
        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            # DeepSpeed sends stage 1 with bfloat16 and float32 accumulation to another optimizer
            # class, which applies non-finite gradients; its ZeRO class does all of it.
            return "zero_optimization"

    # DeepSpeed would compile a shared-memory all-reduce with g++ at first use: minutes, on CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_init_required=False)
    groups = Groups(mesh)
    return Engine(
        args=None,
        model=model,
        optimizer=optimizer,
        model_parameters=None,
        mpu=groups,
        dist_init_required=False,
        config=config,
        config_class=DeepSpeedConfig(config, groups),
    )
