"""Training where no rank shares a parameter with another: one data-parallel, one context rank.

What ZeRO does to cut states and send gradients costs more than the update itself on one rank. Here
a gradient is added to its float32 sum as soon as it is whole, and one fused AdamW reads it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.fragment import Fragment
from parallel.mesh import Mesh


class WholeEngine:
    """A model with its optimizer (fused), every state whole on its tensor-parallel rank."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        mesh: Mesh,
        *,
        bf16: bool,
        clip: float,
    ) -> None:
        self.model, self.optimizer, self.mesh, self.clip = model, optimizer, mesh, clip
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights: list[Tensor] = list(trained.values())
        # In float32 the weights are their own masters.
        self.masters: dict[str, Tensor] = dict(trained)
        if bf16:
            model.to(torch.bfloat16)
            # Of the rounded weights, as ZeRO makes them: every layout begins at the same place.
            self.masters = {name: p.detach().float() for name, p in trained.items()}
            pairs = list(zip(self.weights, self.masters.values(), strict=True))
            master_of = {id(weight): master for weight, master in pairs}
            for group in optimizer.param_groups:
                group["params"] = [master_of[id(weight)] for weight in group["params"]]
            for weight, master in pairs:
                weight.register_post_accumulate_grad_hook(_widened_into(master))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model forward."""
        return self.model(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of loss. last: before `step`; nothing is sent, so nothing follows."""
        loss.backward()

    @torch.no_grad()
    def step(self, lr: float) -> float | None:
        """Update the weights; return the gradient norm before clipping, over all ranks.

        lr is multiplied by a parameter group's own `lr_scale`, where it has one. Returns None, and
        leaves weights and moments as they were, where a gradient is not finite.
        """
        for master in self.masters.values():
            if master.grad is None:  # its moments decay all the same
                master.grad = torch.zeros_like(master)
        norm = self._norm()
        finite = bool(norm.isfinite())
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            # The fused update divides by it on its way: no pass over the gradients of its own.
            self.optimizer.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1.0)  # type: ignore[attr-defined]
            self.optimizer.step()
            self._follow()
        self.optimizer.zero_grad()
        return norm.item() if finite else None

    @torch.no_grad()
    def fragments(self) -> Iterator[Fragment]:
        """Yield master weights and moments, as views, by parameter."""
        for name, master in self.masters.items():
            state = self._moments(master)
            values = {"master": master, "exp_avg": state["exp_avg"]}
            values["exp_avg_sq"] = state["exp_avg_sq"]
            yield Fragment(name, 0, {kind: value.data.view(-1) for kind, value in values.items()})
        for name, parameter in self.frozen.items():
            yield Fragment(name, 0, {"master": parameter.data.view(-1)})

    def optimizer_step_count(self) -> float:
        """Return how many updates the moments have seen."""
        for master in self.masters.values():
            return float(self._moments(master)["step"])
        return 0.0

    @torch.no_grad()
    def restore(self, step_count: float) -> None:
        """Call after copying into `fragments`: weights follow the masters, moments their count."""
        for master in self.masters.values():
            self._moments(master)["step"].fill_(step_count)
        self._follow()

    def _norm(self) -> Tensor:
        """Return the norm of the whole gradient, 0-dim float32; not finite where any rank's is not.

        A parameter that every tensor-parallel rank holds whole counts once.
        """
        mesh, grads, counted = self.mesh, [], []
        for weight, master in zip(self.weights, self.masters.values(), strict=True):
            assert master.grad is not None
            grads.append(master.grad)
            if mesh.tp_rank == 0 or getattr(weight, "tensor_model_parallel", False):
                counted.append(master.grad)
        norm = nn.utils.get_total_norm(grads)
        if mesh.tp > 1:
            square = nn.utils.get_total_norm(counted).square() + 0 * norm
            dist.all_reduce(square, group=mesh.tp_group)
            norm = square.sqrt()
        return norm

    def _follow(self) -> None:
        """Round the masters to the weights, where they are not the same."""
        masters = list(self.masters.values())
        if self.weights and self.weights[0] is not masters[0]:
            torch._foreach_copy_(self.weights, masters)

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """Return AdamW's state of a master; before the first step zeros, as it makes it."""
        state: dict[str, Tensor] = self.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
        return state


def _widened_into(master: Tensor) -> Callable[[Tensor], None]:
    """Return a hook that moves a weight's gradient into its master's, in float32."""

    def move(weight: Tensor) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad += weight.grad
        weight.grad = None

    return move
