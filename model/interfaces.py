"""The two things a layout injects into the model, and what a forward pass knows of its segments.

The model is single-device code. `Sequence` says how a segment is spread over ranks (context
parallelism), `Linears` how weights are (tensor parallelism). model.local has them for one device,
the parallel package for many; the model cannot tell which it got.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from model.fold import Piece
from model.kernels import Kernel
from model.packed import Packed


class Sequence(Protocol):
    """A segment's tokens, wherever they live. What it returns of memory rows every rank holds."""

    rank: int
    size: int

    def positions(self, segment_len: int) -> Tensor:
        """Return the places in the segment of this rank's tokens, rising: [S / size] int64, CPU."""
        ...

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
        """Return token attention over segment, past segments and pieces; see fold.fold."""
        ...

    def fold_slots(self, q: Tensor, k: Tensor, v: Tensor, *, pieces: Items[Piece]) -> Tensor:
        """Return the attention of rows over a whole segment and pieces; see fold.fold_slots."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' x; its gradient is summed likewise."""
        ...

    def combine(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ranks' (out, lse) merged; see totals.combine."""
        ...

    def first_half(self) -> Sequence:
        """Return the sequence of the segment's first half: the first half of every rank's slice.

        Raises ValueError where that is not what the ranks hold.
        """
        ...


class Linears(Protocol):
    """Weights, wherever they live. Modules take and give flat rows [rows, features].

    With sequence parallelism rows outside the linear maps are scattered over the ranks: `column`,
    `enter` gather them, `row` and `embedding` scatter their results.
    """

    size: int
    scattered: int  # ranks that rows are scattered over: size with sequence parallelism, else 1
    rank: int  # this one of them

    def column(
        self,
        in_features: int,
        out_features: int,
        *,
        stride: int = 1,
        bias: bool = False,
        fp8: bool = False,
    ) -> nn.Module:
        """Return a map whose output features are split: [rows, in] -> [all rows, out / size].

        stride 2: the weight is two matrices stacked, each split by itself (gate and up). A bias
        is split as the output features are. fp8: its products are as in model.float8.
        """
        ...

    def row(self, in_features: int, out_features: int, *, fp8: bool = False) -> nn.Module:
        """Return a map whose input features are split: [all rows, in / size] -> [rows, out]."""
        ...

    def embedding(self, num_embeddings: int, features: int) -> nn.Module:
        """Return a table split by its rows: tokens [rows] int64 -> [rows, features]."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """Return all rows of x; its gradient, partial on each rank, is summed on the way back."""
        ...

    def scatter(self, x: Tensor) -> Tensor:
        """Return this rank's rows of x, which every rank holds whole."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Return all rows of x for every rank to hold; the inverse of scatter."""
        ...

    def share(self, x: Tensor) -> Tensor:
        """Return all rows of x for each rank to use with its own rows of tokens.

        Like gather, but the gradient is summed over the ranks that rows are scattered over.
        """
        ...

    def per_head(self, *shape: int) -> nn.Parameter:
        """Return a parameter whose first dimension, one entry a head, is split over the ranks."""
        ...

    def parts(self, x: Tensor) -> Tensor:
        """Return every rank's x, stacked [size, ...]; without gradient."""
        ...


class Segments(NamedTuple):
    """What the layers know of the N segments of B streams in one forward pass."""

    batch: int
    num_segments: int  # N
    length: int  # S, tokens of a segment on this rank
    segment_len: int  # tokens of a segment over all ranks
    starts: Tensor  # [B, N] bool: a document begins with this segment; memory resets before it
    weights: Tensor | None  # [B, N] float32: log of how many segments like it each stands for
    window: int  # M, segments before whose keys tokens read
    cos: Tensor  # [M + N, S, K / 2] float32: RoPE of this rank's tokens, carried segments first;
    sin: Tensor  # [B, M + N, S, K / 2] where segments are packed: places inside documents
    filled: int | None  # tokens known of one open segment, padding behind them; None: complete
    rope: Callable[[Tensor], tuple[Tensor, Tensor]]  # (cos, sin) of other positions, same origin
    sequence: Sequence
    linears: Linears
    packed: Packed | None = None  # of packed segments; None: each segment is one document's

    def of(self, n: int) -> Segments:
        """Return what the layers know of segment n alone (N = 1); not for packed segments."""
        return self._replace(
            num_segments=1,
            starts=self.starts[:, n : n + 1],
            cos=self.cos[: self.window + 1],
            sin=self.sin[: self.window + 1],
        )
