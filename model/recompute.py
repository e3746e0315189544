"""Cheap results that backward computes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def recomputed(compute: Callable[[Tensor], Tensor], x: Tensor, use: Callable[[Tensor], Any]) -> Any:
    """Return use(compute(x)); where `use` keeps compute(x) for backward, x is kept in its place.

    compute: elementwise or a norm, cheap beside what `use` does with its result; without
    randomness. use: saves the whole of it, by itself; views of it and what a checkpoint or hooks
    inside `use` hold are kept as ever. x must not be written to before the backward, which raises
    RuntimeError if it was.
    """
    if not torch.is_grad_enabled():
        return use(compute(x))
    result: Tensor = checkpoint(compute, x, use_reentrant=False, preserve_rng_state=False)
    kept, version, storage = x.detach(), x._version, _storage(result)

    def pack(saved: Tensor) -> Tensor | None:
        # While `use` runs `result` lives, so nothing else can be in its storage.
        same = _storage(saved) == storage and saved.shape == result_shape
        return None if same and saved.is_contiguous() else saved

    def unpack(saved: Tensor | None) -> Tensor:
        if saved is not None:
            return saved
        if kept._version != version:
            raise RuntimeError("what backward computes again from was written to since forward")
        with torch.no_grad():
            return compute(kept)

    result_shape = result.shape
    with saved_tensors_hooks(pack, unpack):
        return use(result)


def _storage(x: Tensor) -> int:
    """Return what is the same for tensors of one memory; fake ones have no address."""
    address: int = x.untyped_storage()._cdata
    return address
