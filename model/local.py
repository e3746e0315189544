"""`Sequence` and `Linears` of one device: the reference that every layout must equal."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor, nn

from model.attention import Alone, Exchange, Layout, Whole
from model.deferred import Linear
from model.float8 import Float8Linear
from model.fold import Piece, fold, fold_slots
from model.kernels import Kernel
from model.packed import Packed
from model.totals import combine, total


class FoldedSequence:
    """A `Sequence` by a layout and an exchange; with none given, one device."""

    def __init__(self, layout: Layout | None = None, exchange: Exchange | None = None) -> None:
        self.layout: Layout = layout or Whole()
        self.exchange: Exchange = exchange or Alone()
        self.rank, self.size = self.exchange.rank, self.exchange.size

    def positions(self, segment_len: int) -> Tensor:
        """Return the places of this rank's tokens."""
        return self.layout.positions(self.rank, segment_len)

    def fold(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        pieces: Items[Piece] = (),
        visible: Tensor | None = None,
        kernel: Kernel | None = None,
        other: tuple[Tensor, Tensor] | None = None,
        packed: Packed | None = None,
    ) -> Tensor:
        """Return token attention; see fold.fold."""
        return fold(
            q, k, v, pieces=pieces, visible=visible, kernel=kernel, other=other,
            layout=self.layout, exchange=self.exchange, packed=packed,
        )  # fmt: skip

    def fold_slots(self, q: Tensor, k: Tensor, v: Tensor, *, pieces: Items[Piece]) -> Tensor:
        """Return the attention of rows; see fold.fold_slots."""
        return fold_slots(q, k, v, pieces=pieces, exchange=self.exchange)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        return total(x, self.exchange) if self.size > 1 else x

    def combine(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Return the merge over the ranks."""
        return combine(out, lse, self.exchange) if self.size > 1 else (out, lse)

    def first_half(self) -> FoldedSequence:
        """Return the sequence of the first half."""
        layout = self.layout.first_half()
        if layout is None:
            raise ValueError(
                "the first half of a segment does not lie evenly on its ranks; use"
                " parallel.layout=zigzag"
            )
        return FoldedSequence(layout, self.exchange)


class LocalLinears:
    """`Linears` with every weight whole on this device."""

    size = 1
    scattered = 1
    rank = 0

    def column(
        self,
        in_features: int,
        out_features: int,
        *,
        stride: int = 1,
        bias: bool = False,
        fp8: bool = False,
    ) -> nn.Module:
        """Return a linear map."""
        return (Float8Linear if fp8 else Linear)(in_features, out_features, bias=bias)

    def row(self, in_features: int, out_features: int, *, fp8: bool = False) -> nn.Module:
        """Return a linear map without bias."""
        return self.column(in_features, out_features, fp8=fp8)

    def embedding(self, num_embeddings: int, features: int) -> nn.Module:
        """Return a lookup table."""
        return nn.Embedding(num_embeddings, features)

    def enter(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def scatter(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def share(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def per_head(self, *shape: int) -> nn.Parameter:
        """Return an empty parameter."""
        return nn.Parameter(torch.empty(shape))

    def parts(self, x: Tensor) -> Tensor:
        """Return x as the only part."""
        return x.unsqueeze(0)
