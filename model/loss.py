"""Next-token loss that never holds all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""Label of a position that is no target; torch's own convention."""

CrossEntropy = Callable[[Tensor, Tensor], Tensor]


class _ChunkedLoss(torch.autograd.Function):
    """Loss and its gradient chunk by chunk in forward: logits of one chunk exist at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor,
        chunk: int,
        cross_entropy: CrossEntropy,
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        wanted = of_hidden or of_weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        dhidden = torch.empty_like(hidden) if of_hidden else None
        dweight: Tensor | None = None
        losses = []
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            target = labels[rows]
            valid = target != IGNORE
            logits = (hidden[rows] @ weight.t()).requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                loss = cross_entropy(logits, target.masked_fill(~valid, 0)) * valid
                total = loss.sum() * scale
            losses.append(loss.detach())
            if wanted:
                (dlogits,) = torch.autograd.grad(total, logits)
            if dhidden is not None:
                dhidden[rows] = dlogits @ weight
            if of_weight:
                part = dlogits.t() @ hidden[rows]
                # Hundreds of chunks add up here: bfloat16 would lose the later ones.
                dweight = part if hidden.shape[0] <= chunk else _added(dweight, part, wide)
        token_losses = torch.cat(losses)
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        ctx.save_for_backward(dhidden, dweight)
        ctx.mark_non_differentiable(token_losses)
        return token_losses.sum() * scale, token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: they are nobody else's, and torch refuses a second backward over them.
        grads = (None if d is None else d.mul_(dloss) for d in ctx.saved_tensors)
        return *grads, None, None, None, None


def _added(total: Tensor | None, part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.to(dtype) if total is None else total.add_(part)


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    chunk: int,
    cross_entropy: CrossEntropy,
) -> tuple[Tensor, Tensor]:
    """Return (sum of token losses * scale, token losses [rows] float32).

    hidden [rows, D]; weight [V, D], this rank's rows of the output matrix; labels [rows] int64,
    IGNORE where there is no target (loss 0); scale a 0-dim tensor: 1 / the global number of
    targets. Gradients of hidden are partial where weight is a part: see Linears.enter.
    """
    loss, token_losses = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, scale, chunk, cross_entropy
    )
    return loss, token_losses
