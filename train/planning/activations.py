"""Bytes of activations on one rank at their peak, from shapes alone.

The sums follow the code of model/: what each operation keeps for its backward, and what is beside
it while the backward of one layer runs. tests/train/planning holds them against a dry run.
Names of sizes: R rows inside linear maps, Rs rows outside them (scattered under sequence
parallelism), D hidden_size, Q and K features of queries and of keys on this rank, F ffn features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from model.config import LandmarkMemory, MemoryConfig, ModelConfig
from model.memory.armt import ROLLS
from model.memory.grouped import fuses
from train.planning.shapes import Shapes, part_at_once, rows_in_turn
from train.planning.states import WIDE, layer_state, parts_of
from train.planning.weights import count_weights
from train.settings.config import Config


class _Sizes(NamedTuple):
    model: ModelConfig
    shapes: Shapes

    @property
    def rows(self) -> float:
        return self.shapes.rows

    @property
    def outside(self) -> float:
        return self.shapes.rows / self.shapes.scattered

    @property
    def width(self) -> int:
        return self.model.hidden_size

    @property
    def queries(self) -> float:
        return self.model.num_heads * self.model.head_dim / self.shapes.tp

    @property
    def keys(self) -> float:
        return self.model.num_kv_heads * self.model.head_dim / self.shapes.tp

    @property
    def ffn(self) -> float:
        return self.model.ffn_size / self.shapes.tp

    @property
    def reach(self) -> float:
        """Keys of segment and window, over those of the segments alone."""
        return (self.model.window + self.shapes.segments) / self.shapes.segments


class Activations(NamedTuple):
    """Bytes at the peak of a forward and backward pass, by part."""

    layers: float  # what all layers keep for their backward
    memory: float  # of it, the memory's chain, whose graph reaches over the window of BPTT
    recomputed: float  # one layer, computed again
    backward: float  # beside them while a layer's, or the head's, gradient is computed
    messages: float  # keys and their gradients on their way
    logits: float  # of one chunk, and the head's gradients
    state: float  # what is carried to the next pass
    stacked: float  # a copy of the blocks' weights, and its gradient (train.wavefront)

    @property
    def total(self) -> float:
        """All parts but memory, which layers contains."""
        return (
            self.layers + self.recomputed + self.backward + self.messages + self.logits + self.state
        ) + self.stacked


def activations(
    config: Config, model: ModelConfig, shapes: Shapes, device: str = "cpu"
) -> Activations:
    """Return the bytes at the worst moment: the loss, or the backward of the head or of a layer.

    device: "cuda" has kernels that a CPU has not.
    """
    s = _Sizes(model, shapes)
    mode, layers = config.train.checkpointing, model.num_layers
    token_layer, memory_layer = _kept(s, "none", config), _memory_kept(s, model.memory)
    token_kept = _kept(s, mode, config)
    memory_kept = memory_layer if mode != "block" else _memory_inputs(s, model.memory)
    state = layer_state(model, shapes) * layers
    more = 1.5 if model.memory.name == "hmt" else 1.0  # halves are read once more, for summaries
    kept = layers * (more * token_kept + memory_kept)
    stacked = 0
    if config.train.wavefront:
        stacked = shapes.element * count_weights(model).blocks

    def moment(
        *, backward: float, recomputed: float = 0.0, messages: float = 0.0, logits: float = 0.0
    ) -> Activations:
        sent, copies = messages + _gathered(s), 1 if logits else 2
        return Activations(
            kept, memory_kept * layers, recomputed, backward, sent, logits, state, copies * stacked
        )

    part = part_at_once(config, model, shapes)
    again = 0.0
    if mode == "block":
        again = (token_layer + memory_layer) * part
    elif mode == "selective":
        again = _norms_and_product(s, config)
    inner = _ffn_kept(s, config) * part
    norm, at_norm = _norm_inside(s), 5 * WIDE * s.outside * s.width
    dx = s.shapes.element * s.outside * s.width * part
    before = inner + (norm + dx) * part  # what FFN and its norm kept: gone when attention goes back
    ring = _messages(s, config) * part
    moments = [
        moment(backward=0.0, logits=norm + _loss(s, config)),
        moment(backward=at_norm, logits=WIDE * s.outside * s.width),
        moment(recomputed=again, backward=dx + _ffn_backward(s, config) * part),
        moment(recomputed=again - inner - dx, backward=dx + at_norm * part),
        moment(
            recomputed=again - before,
            backward=dx + _attention_backward(s, model.memory, device) * part,
            messages=ring,
        ),
    ]
    return max(moments, key=lambda moment: moment.total)


def activations_of_layer(config: Config, model: ModelConfig, shapes: Shapes) -> float:
    """Return what one layer makes for its backward without checkpointing, its memory included."""
    s = _Sizes(model, shapes)
    return _kept(s, "none", config) + _memory_kept(s, model.memory)


def _kept(s: _Sizes, mode: str, config: Config) -> float:
    """Return what the tokens of one layer keep.

    none: each norm its input in float32, the normalised and the scaled rows; q, k, v as attention
    reads them, the window's with them; out and lse; gate and up, silu, product.
    selective: each norm's input, attention, gate and up. block: the layer's input.
    """
    e, x = s.shapes.element, s.outside * s.width
    if mode == "block":
        return e * x
    attention = (
        e * s.rows * 2 * (s.queries + s.keys * s.reach)
        + _extra_projection(s)
        + WIDE * s.rows * s.model.num_heads / s.shapes.tp
    )
    chunked = _ffn_rows(s, config) < s.rows
    if mode == "selective":
        return 2 * e * x + attention + (0.0 if chunked else 2 * e * s.rows * s.ffn)
    norms = 2 * _norm_inside(s) + 2 * e * x
    return norms + attention + _ffn_kept(s, config)


def _ffn_kept(s: _Sizes, config: Config) -> float:
    """Return what the FFN keeps: gate and up, silu of gate, their product; of chunks nothing."""
    chunked = _ffn_rows(s, config) < s.rows
    return 0.0 if chunked else 4 * s.shapes.element * s.rows * s.ffn


def _norm_inside(s: _Sizes) -> float:
    """Return what a norm keeps: its input in float32, and the rows that its gain multiplies."""
    return (WIDE + s.shapes.element + WIDE / s.width) * s.outside * s.width


def _norms_and_product(s: _Sizes, config: Config) -> float:
    """Return what the rest of a block has recomputed under `selective`, products apart."""
    e, rows = s.shapes.element, _ffn_rows(s, config)
    return _norm_inside(s) + 2 * e * s.outside * s.width + 2 * e * rows * s.ffn


def _ffn_rows(s: _Sizes, config: Config) -> float:
    """Return the rows that the FFN takes at once."""
    chunk = config.train.ffn_chunk
    return s.rows if chunk is None else min(s.rows, chunk)


def _ffn_backward(s: _Sizes, config: Config) -> float:
    """Return what stands beside a layer's kept tensors while its FFN goes backward."""
    e, rows = s.shapes.element, _ffn_rows(s, config)
    inner = 2 * e * rows * s.ffn
    if s.shapes.scattered > 1:
        inner = max(inner, 2 * e * rows * s.width)  # rows gathered, and their gradient
    if rows < s.rows:  # a chunk is recomputed here
        inner += 4 * e * rows * s.ffn
    rounded = 0.0
    # The gradient of gate and up, scaled and rounded. Without block another moment is the peak.
    if config.train.fp8 and config.train.checkpointing == "block":
        rounded = (1 if config.train.compile else e + 1) * 2 * rows * s.ffn
    return inner + e * s.width * s.ffn + rounded


def _attention_backward(s: _Sizes, memory: MemoryConfig, device: str) -> float:
    """Return what stands beside a layer's kept tensors while its attention goes backward."""
    e = s.shapes.element
    pieces = s.shapes.cp > 1 or s.model.window or memory.name not in ("none", "window")
    wide = WIDE if pieces else 0
    gradients = s.rows * ((2 * e + wide) * s.queries + 2 * (e + wide) * s.keys * s.reach)
    return gradients + _kernel(s, memory, device)


def _gathered(s: _Sizes) -> float:
    """Return megatron's buffer for rows gathered over tensor-parallel ranks, which it keeps."""
    return s.shapes.element * s.rows * s.width if s.shapes.scattered > 1 else 0.0


def _kernel(s: _Sizes, memory: MemoryConfig, device: str) -> float:
    """Return the scores that an unfused kernel holds: landmark's, 256 rows of queries at a time."""
    if not isinstance(memory, LandmarkMemory):
        return 0.0
    dtype = torch.bfloat16 if s.shapes.element == 2 else torch.float32
    if fuses(device, dtype, s.model.head_dim, memory.block):
        return 0.0
    heads = s.shapes.batch * s.shapes.segments * s.model.num_heads / s.shapes.tp
    scores = min(2**26, heads * min(256, s.shapes.length) * s.shapes.length)
    return 5 * WIDE * scores


def _messages(s: _Sizes, config: Config) -> float:
    """Return keys and values on the ring with their float32 gradients, or all ranks' at once."""
    if s.shapes.cp == 1:
        return 0.0
    pair = 2 * s.rows * s.keys * s.reach
    if config.parallel.attention == "ring":  # gradients: own ones; from the third step on, others'
        return pair * (2 * s.shapes.element + (3 if s.shapes.cp > 2 else 1) * WIDE)
    return pair * s.shapes.cp * (s.shapes.element + WIDE)


def _loss(s: _Sizes, config: Config) -> float:
    """Return what the last chunk's loss holds: logits, the weight's gradient beside its sum."""
    e, vocab = s.shapes.element, s.model.padded_vocab_size / s.shapes.tp
    chunk = min(config.train.loss_chunk, s.rows)
    wide = 0 if config.train.compile else WIDE + (WIDE if e < WIDE else 0)
    part = e * vocab * s.width  # of the weight's gradient: of this chunk, or the whole, rounded
    logits = chunk * vocab * e + max(chunk * vocab * wide, part)
    hidden = s.outside * s.width + (s.rows * s.width if s.shapes.scattered > 1 else 0)
    weight = vocab * s.width * WIDE if chunk < s.rows else 0.0  # summed in float32
    return logits + e * hidden + e * s.rows * s.width + weight


def _extra_projection(s: _Sizes) -> float:
    extra = sum(m.slots for m in parts_of(s.model.memory) if m.name == "abc")
    return s.shapes.element * s.rows * extra * s.model.num_kv_heads / s.shapes.tp


def _chain_rows(s: _Sizes, memory: MemoryConfig) -> float:
    """Return the memory rows of a pass that go through a layer's own weights."""
    streams = s.shapes.batch * s.shapes.segments
    match memory.name:
        case "fam":
            return (streams + 1) * memory.slots
        case "rmt":
            return streams * 2 * memory.slots
        case "armt":
            return streams * memory.slots
        case "hmt":
            return streams * (memory.sensory + 5)
    return 0


def _memory_kept(s: _Sizes, memory: MemoryConfig) -> float:
    """Return what a layer's memory keeps: its rows as tokens do, and what it does to tokens."""
    e, rows, kept = s.shapes.element, s.rows, 0.0
    heads = s.model.num_kv_heads / s.shapes.tp
    streams = s.shapes.batch * s.shapes.segments
    for part in parts_of(memory):
        chain = _chain_rows(s, part)
        inner = 4 * e * s.ffn + e * (3 * s.queries + 3 * s.keys)
        kept += chain * (inner + 2 * (2 * WIDE + e) * s.width / s.shapes.scattered * 1.2)
        match part.name:
            case "infini":
                matrices = streams * heads * s.model.head_dim**2 * WIDE
                kept += rows * (22 * s.queries + 11 * s.keys) + 8 * matrices
            case "abc" | "cmab":
                slots = part.slots if part.name == "abc" else part.latents
                copies, of_keys = (4, 8) if part.name == "abc" else (3, 12)
                means = streams * heads * slots * 2 * s.model.head_dim * WIDE
                kept += rows * (heads * slots * WIDE * copies + of_keys * s.keys) + 3 * means
            case "armt":
                features = 2 * ROLLS * part.key_dim
                outside = s.outside
                kept += outside * (3 * WIDE * features + (WIDE + e) * s.width)
                kept += 2 * streams * features * s.width * WIDE
            case "landmark":
                kept += 2 * e * rows * s.keys
    return kept


def _memory_inputs(s: _Sizes, memory: MemoryConfig) -> float:
    """Return what a layer's memory keeps where blocks are recomputed: rows and states handed on."""
    kept = 0.0
    for part in parts_of(memory):
        streams = s.shapes.batch * s.shapes.segments
        match part.name:
            case "fam":
                inner = 4 * s.shapes.element * s.ffn + s.shapes.element * 3 * s.queries
                kept += part.slots * (inner + 10 * WIDE * s.width)  # the prompt's own way
            case "rmt" | "hmt":
                kept += _chain_rows(s, part) * s.width * WIDE / s.shapes.scattered
            case "armt":
                features = 2 * ROLLS * part.key_dim
                kept += streams * (features * s.width + part.slots * s.width) * WIDE
    if rows_in_turn(s.model) and s.model.window:
        kept += 2 * s.shapes.element * s.rows * s.keys * s.model.window
    return kept + layer_state(s.model, s.shapes)
