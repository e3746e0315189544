"""Next-token loss that never holds all logits.

Over a vocabulary that is cut into parts, as over keys in attention, a part's log-sum-exp is all
that the others need of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.compiled import fused
from model.interfaces import Linears
from model.precision import sum_dtype

IGNORE = -100
"""Label of a position that is no target; torch's own convention."""


class Columns(NamedTuple):
    """Which part of the vocabulary a rank's logits are."""

    first: int  # the token of the first column
    real: int  # columns that stand for tokens; those behind are padding and take no probability
    parts: Callable[[Tensor], Tensor]  # every rank's tensor, stacked [ranks, ...]


def columns_of(linears: Linears, width: int, vocab_size: int) -> Columns:
    """Return which `width` columns are this rank's, of a vocabulary padded at its end."""
    first = linears.rank * width
    return Columns(first, max(0, min(width, vocab_size - first)), linears.parts)


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
        columns: Columns,
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if of_hidden else None
        dweight: Tensor | None = None
        losses = []
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.t()
            loss, lse = cross_entropy(logits, labels[rows], columns)
            losses.append(loss)
            if of_hidden or of_weight:
                each = (labels[rows] != IGNORE) * scale
                become_gradient(logits, labels[rows], columns, loss, lse, each)
            if dhidden is not None:
                dhidden[rows] = logits @ weight
            if of_weight:
                dweight = _added(dweight, logits.t() @ hidden[rows], hidden.shape[0] > chunk)
            del logits  # before the next chunk's are made
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
        # Times 1 is left out where looking costs nothing: a pass over the output matrix. (A dry
        # run's tensors are no plain ones, and hold nothing to look at.)
        unchanged = type(dloss) is Tensor and dloss.device.type == "cpu" and dloss.item() == 1
        grads = (d if d is None or unchanged else d.mul_(dloss) for d in ctx.saved_tensors)
        return *grads, None, None, None, None


def _added(total: Tensor | None, part: Tensor, more: bool) -> Tensor:
    """Return the sum; hundreds of chunks add up, and bfloat16 would lose the later ones."""
    if total is not None:
        _add(total, part)
        return total
    return part.to(sum_dtype(part)) if more else part


@fused
def _add(total: Tensor, part: Tensor) -> None:
    """Add a part of a narrower type, which torch alone would first copy as a whole."""
    total.add_(part)


def cross_entropy(logits: Tensor, labels: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """Return -log p(label) [rows], 0 where it is IGNORE, and the whole vocabulary's lse [rows].

    logits [rows, V / ranks], of which those that are `columns`; labels [rows] int64. float32, or
    float64 for such logits. Both are nan where the vocabulary has no such label, and so is the
    gradient: the step is skipped and its samples are named.
    """
    parts = columns.parts(torch.stack(_read(logits[:, : columns.real], labels - columns.first)))
    lse, target, found = parts[:, 0].logsumexp(0), parts[:, 1].sum(0), parts[:, 2].sum(0)
    ignored = labels == IGNORE
    lse = lse.masked_fill((found == 0) & ~ignored, float("nan"))
    return (lse - target).masked_fill(ignored, 0.0), lse


def become_gradient(
    logits: Tensor, labels: Tensor, columns: Columns, loss: Tensor, lse: Tensor, weight: Tensor
) -> None:
    """Turn logits into the gradient of (loss * weight).sum(), in place.

    loss, lse: what cross_entropy returned; weight [rows], 0 where a label is IGNORE.
    """
    real = logits[:, : columns.real]
    logits[:, columns.real :] = 0.0
    if columns.real > 0:
        _become_shares(real, lse, weight)
        column, here = _locate(labels - columns.first, columns.real)
        # p - 1 at the target, from the loss: p in bfloat16 would have lost the difference
        target = torch.where(here, torch.expm1(-loss) * weight, _at(real, column))
        # not scatter_, which on a CPU takes longer than all the rest
        real[torch.arange(len(column), device=column.device), column] = target.to(real.dtype)


def _locate(labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return (the label's column, whether it is among these), each [rows]; column 0 if not."""
    here = (labels >= 0) & (labels < columns)
    return labels.masked_fill(~here, 0), here


def _at(logits: Tensor, column: Tensor) -> Tensor:
    return logits.gather(1, column.unsqueeze(1)).squeeze(1)


def _read(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return these columns' lse, the logit at the label, and 1; 0, 0 if it is not among them."""
    if logits.shape[1] == 0:
        wide = sum_dtype(logits)
        lse = torch.full_like(labels, float("-inf"), dtype=wide)
        return lse, torch.zeros_like(lse), torch.zeros_like(lse)
    column, here = _locate(labels, logits.shape[1])
    lse = _log_sum_exp(logits)
    return lse, _at(logits, column).to(lse.dtype).masked_fill(~here, 0.0), here.to(lse.dtype)


@fused
def _log_sum_exp(logits: Tensor) -> Tensor:
    return logits.to(sum_dtype(logits)).logsumexp(-1)


@fused
def _become_shares(logits: Tensor, lse: Tensor, weight: Tensor) -> None:
    """Write p * weight over the logits."""
    logits.copy_((logits.to(lse.dtype) - lse.unsqueeze(1)).exp_().mul_(weight.unsqueeze(1)))


def chunked_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, *, chunk: int, columns: Columns
) -> tuple[Tensor, Tensor]:
    """Return (sum of token losses * scale, token losses [rows] float32).

    hidden [rows, D]; weight [V, D], this rank's rows of the output matrix; labels [rows] int64,
    IGNORE where there is no target (loss 0); scale a 0-dim tensor: 1 / the global number of
    targets. Gradients of hidden are partial where weight is a part: see Linears.enter.
    """
    if not torch.is_grad_enabled():  # which forward cannot see: it would make them all the same
        hidden, weight = hidden.detach(), weight.detach()
    loss, token_losses = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, scale, chunk, columns
    )
    return loss, token_losses
