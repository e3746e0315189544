"""Attention with full masks: the slow twin of every fold."""

import math

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of softmax attention.

    q [..., Sq, H, K]; k, v [..., Sk, Hkv, K]; mask [..., Sq, Sk] bool: which query reads which
    key. out has q's shape, lse is [..., Sq, H].
    """
    group = q.shape[-2] // k.shape[-2]
    k, v = k.repeat_interleave(group, -2), v.repeat_interleave(group, -2)
    scores = torch.einsum("...qhd,...khd->...qkh", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask.unsqueeze(-1), float("-inf"))
    out = torch.einsum("...qkh,...khd->...qhd", scores.softmax(-2), v)
    return out, scores.logsumexp(-2)


def dense_fold(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: tuple[Tensor, Tensor] | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Return attention.fold of whole segments, one segment and one full mask at a time."""
    batch, count, length = q.shape[:3]
    carried = k.shape[1] - count
    rows = []
    for b in range(batch):
        for n in range(count):
            keys, values, masks = [], [], []
            for lag in range(carried, 0, -1):
                keys.append(k[b, carried + n - lag])
                values.append(v[b, carried + n - lag])
                seen = visible is None or bool(visible[b, n, lag - 1])
                masks.append(torch.full((length, length), seen))
            keys.append(k[b, carried + n])
            values.append(v[b, carried + n])
            masks.append(torch.ones(length, length).tril().bool())
            if slots is not None:
                keys.append(slots[0][b, n])
                values.append(slots[1][b, n])
                masks.append(torch.ones(length, slots[0].shape[2], dtype=torch.bool))
            mask = torch.cat(masks, 1)
            rows.append(attend(q[b, n], torch.cat(keys), torch.cat(values), mask)[0])
    return torch.stack(rows).unflatten(0, (batch, count))


def dense_fold_slots(q: Tensor, k: Tensor, v: Tensor, slots: tuple[Tensor, Tensor]) -> Tensor:
    """Return attention.fold_slots of a whole segment: every query reads every key."""
    keys, values = torch.cat((k, slots[0]), 1), torch.cat((v, slots[1]), 1)
    mask = torch.ones(q.shape[0], q.shape[1], keys.shape[1], dtype=torch.bool)
    return attend(q, keys, values, mask)[0]
