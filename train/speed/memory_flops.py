"""What each memory adds to a token's forward pass, counted as train.speed.metrics counts.

Left out, as norms and softmax are there: products with a vector (infini's norm), triangular systems
as large as a memory's own rows (armt), and scores of blocks before the window (landmark), whose
number is the document's.
"""

from __future__ import annotations

from typing import NamedTuple

from model.config import (
    AbcMemory,
    ArmtMemory,
    CmabMemory,
    ComposedMemory,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    LandmarkMemory,
    MemoryConfig,
    ModelConfig,
    RmtMemory,
)
from model.memory.armt import ROLLS


class MemoryFlops(NamedTuple):
    """Of one token, in a full segment far enough in its document."""

    keys: float  # that a token reads in every layer, beside those of window and segment
    flops: float  # of the memory's own rows and products, in all layers


class Costs(NamedTuple):
    """What the rows of a model cost, in all layers."""

    row: float  # one row through all blocks, but for scores and weighted sums
    key: float  # one key read by one query


def block_costs(model: ModelConfig) -> Costs:
    """Return what a row and a key cost, a multiply-add counted as 2."""
    queries = model.num_heads * model.head_dim
    qkv = queries + 2 * model.num_kv_heads * model.head_dim
    block = model.hidden_size * (qkv + queries + 3 * model.ffn_size)
    return Costs(2.0 * model.num_layers * block, 4.0 * model.num_layers * queries)


def memory_flops(model: ModelConfig, memory: MemoryConfig, segment_len: int) -> MemoryFlops:
    """Return what a memory adds; its window's keys are not counted here."""
    match memory:
        case FamMemory():
            rows = _rows(model, memory.slots, memory.slots * (segment_len + memory.slots))
            return MemoryFlops(memory.slots, rows / segment_len)
        case InfiniMemory():
            return MemoryFlops(0.0, _infini(model, memory))
        case AbcMemory():
            scores = model.hidden_size * model.num_kv_heads * memory.slots
            return MemoryFlops(memory.slots, _slots(model, memory.slots, scores))
        case CmabMemory():
            scores = model.num_kv_heads * memory.latents * model.head_dim
            return MemoryFlops(memory.latents, _slots(model, memory.latents, scores))
        case RmtMemory():
            return MemoryFlops(memory.slots, _rmt(model, memory, segment_len) / segment_len)
        case ArmtMemory():
            return MemoryFlops(0.0, _armt(model, memory, segment_len))
        case HmtMemory():
            # the last memory and the sensory rows, and in the second half what was found
            keys = 1.5 + memory.sensory
            return MemoryFlops(keys, _hmt(model, memory, segment_len) / segment_len)
        case LandmarkMemory():
            return MemoryFlops(memory.retrieve * memory.block, 0.0)
        case ComposedMemory():
            parts = [memory_flops(model, part, segment_len) for part in memory.parts]
            return MemoryFlops(sum(p.keys for p in parts), sum(p.flops for p in parts))
        case _:
            return MemoryFlops(0.0, 0.0)


def _rows(model: ModelConfig, rows: float, pairs: float) -> float:
    """Return the FLOPs of rows through all blocks that read as many pairs of row and key."""
    costs = block_costs(model)
    return rows * costs.row + pairs * costs.key


def _infini(model: ModelConfig, memory: InfiniMemory) -> float:
    """Each query head reads a matrix, each key head writes one; delta reads before it writes."""
    writes = 2 if memory.rule == "delta" else 1
    heads = model.num_heads + writes * model.num_kv_heads
    return 2.0 * model.num_layers * heads * model.head_dim**2


def _slots(model: ModelConfig, slots: int, scores: float) -> float:
    """Each token has a score for each slot, and its key and value are added to each."""
    written = model.num_kv_heads * slots * 2 * model.head_dim
    return 2.0 * model.num_layers * (scores + written)


def _rmt(model: ModelConfig, memory: RmtMemory, segment_len: int) -> float:
    """Rows before read one another; rows behind read them, the tokens and one another."""
    slots = memory.slots
    among = slots * slots if memory.mask == "paper" else slots * (slots + 1) / 2
    return _rows(model, 2 * slots, 2 * among + slots * (segment_len + slots))


def _armt(model: ModelConfig, memory: ArmtMemory, segment_len: int) -> float:
    """Tokens and rows read each layer's matrix; rows read the segment and write."""
    width, slots, features = model.hidden_size, memory.slots, 2 * ROLLS * memory.key_dim
    read = width * (memory.key_dim + features)  # the query, and what it finds
    # key, value and strength; what the matrix says to the key, and the change
    write = width * (memory.key_dim + width + 1) + 2 * width * features
    rows = _rows(model, slots, slots * (segment_len + slots))
    products = read * (segment_len + slots) + write * slots
    return (rows + 2.0 * model.num_layers * products) / segment_len


def _hmt(model: ModelConfig, memory: HmtMemory, segment_len: int) -> float:
    """Rows around a segment, its first half read once more for a summary, and the search."""
    half, sensory = segment_len / 2, memory.sensory
    # late and front read themselves; sensory rows front and earlier ones; the last row all
    before = 2 + sensory * (1 + (sensory + 1) / 2)
    around = _rows(model, sensory + 3, before + segment_len + sensory + 3)
    # tokens read the prompt before them; the prompt reads itself, and behind them all
    summary = _rows(model, half + 2, half * (half + 1) / 2 + half + 1 + half + 2)
    products = model.hidden_size * memory.search_dim * (memory.bank + 1)
    products += memory.bank * (memory.search_dim + model.hidden_size)
    return around + summary + 2.0 * products
