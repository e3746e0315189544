"""Bytes of what a layer carries from one forward pass to the next."""

from __future__ import annotations

from model.config import ComposedMemory, LandmarkMemory, MemoryConfig, ModelConfig
from model.memory.armt import ROLLS
from train.planning.shapes import Shapes

WIDE = 4  # bytes of float32


def parts_of(memory: MemoryConfig) -> list[MemoryConfig]:
    """Return the memories that one is made of."""
    return list(memory.parts) if isinstance(memory, ComposedMemory) else [memory]


def retrieving(memory: MemoryConfig) -> list[LandmarkMemory]:
    """Return the memories that go back to blocks: what they take grows with documents."""
    return [part for part in parts_of(memory) if isinstance(part, LandmarkMemory) and part.retrieve]


def layer_state(model: ModelConfig, shapes: Shapes) -> float:
    """Return one layer's state after a pass, and its copy that is carried on."""
    b, m, heads = shapes.batch, model, model.num_kv_heads / shapes.tp
    size = 2 * b * m.window * shapes.length * heads * m.head_dim * shapes.element
    for part in parts_of(model.memory):
        match part.name:
            case "fam":
                size += b * part.slots * m.hidden_size * WIDE
            case "infini":
                size += b * heads * m.head_dim * (m.head_dim + 1) * WIDE
            case "abc" | "cmab":
                slots = part.slots if part.name == "abc" else part.latents
                size += b * heads * slots * (2 * m.head_dim + 1) * WIDE
            case "armt":
                size += b * 2 * ROLLS * part.key_dim * m.hidden_size * WIDE
    return size
