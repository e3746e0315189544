"""What a layout makes of a run: sizes of groups, and rows that one forward pass of a rank has."""

from __future__ import annotations

from typing import NamedTuple

from model.config import ModelConfig
from train.settings.config import Config


class Shapes(NamedTuple):
    """Sizes on one rank. A row is a token's, in the residual stream."""

    tp: int
    cp: int
    dp: int
    scattered: int  # ranks that rows outside linear maps are cut over: tp with sequence parallelism
    batch: int  # B, lanes of a forward pass
    segments: int  # N, of a forward pass
    length: int  # S, tokens of a segment on this rank
    passes: int  # forward passes of a rank in a step: micro-batches times BPTT windows
    element: int  # bytes of a weight and of an activation

    @property
    def world(self) -> int:
        """Ranks."""
        return self.tp * self.cp * self.dp

    @property
    def zero(self) -> int:
        """Ranks that optimizer state is cut over."""
        return self.cp * self.dp

    @property
    def rows(self) -> int:
        """Tokens of a forward pass on this rank, inside linear maps."""
        return self.batch * self.segments * self.length


def shapes_of(config: Config, world: int) -> Shapes:
    """Return the sizes of a configuration that was checked for this world size."""
    parallel, train = config.parallel, config.train
    dp = world // (parallel.tp * parallel.cp)
    windows = config.num_segments // config.bptt_segments
    return Shapes(
        tp=parallel.tp,
        cp=parallel.cp,
        dp=dp,
        scattered=parallel.tp if parallel.sequence_parallel else 1,
        batch=train.micro_batch,
        segments=config.bptt_segments,
        length=config.data.segment_len // parallel.cp,
        passes=train.batch_size // dp // train.micro_batch * windows,
        element=2 if train.precision == "bf16" else 4,
    )


def block_calls(config: Config, model: ModelConfig, shapes: Shapes) -> int:
    """Return how often a pass forward calls a block."""
    layers, segments = model.num_layers, shapes.segments
    if not rows_in_turn(model):
        return layers
    return segments + layers - 1 if config.train.wavefront else segments * layers


def part_at_once(config: Config, model: ModelConfig, shapes: Shapes) -> float:
    """Return what one call of a block works on at most, over all rows of one layer."""
    if not rows_in_turn(model):
        return 1.0
    at_once = min(model.num_layers, shapes.segments) if config.train.wavefront else 1
    return at_once / shapes.segments


def rows_in_turn(model: ModelConfig) -> bool:
    """Return whether segments go through the stack one by one."""
    return model.memory.name in ("rmt", "armt", "hmt")
