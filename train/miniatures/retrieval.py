"""Which blocks landmark attention goes back to: whether a question finds the key's own."""

from __future__ import annotations

import torch
from torch import Tensor

from data.tasks import KEY_DIGITS
from model.decoder import Decoder
from model.memory.base import State
from model.memory.landmark import RetrievalPart, StoresRead
from model.memory.window import read_tokens
from train.miniatures.blocks import Blocks


def retrieves(model: Decoder) -> bool:
    """Whether the model's top layer goes back to blocks."""
    return "store" in model.layers()[-1].mixer.parts


def found(model: Decoder, blocks: Blocks, question: Tensor, state: State, key_block: int) -> Tensor:
    """Return which reads choose the key's block: [rows, heads, 4] bool, of the top layer.

    The reads are those of the four tokens that predict the digits; question [rows, 1, S];
    key_block: its number in the document.
    """
    starts = torch.zeros(question.shape[:2], dtype=torch.bool)
    segments = model.segments(question, starts, fresh=False)
    layers, x = model.layers(), model.embed(question)
    initial = model.memory.initial(layers, model.linears)
    for block, old, begin in zip(layers[:-1], state.layers, initial, strict=False):
        x, _, _ = block(x, None, segments, old, begin)
    top, old = layers[-1], state.layers[-1]
    part = top.mixer.parts["store"]
    assert isinstance(part, RetrievalPart)
    tokens, _ = read_tokens(top, x, segments, old.window)
    store, _ = part.open(top, segments, 0, old.parts["store"], initial[-1])
    (read,) = part.retrieved(segments, StoresRead([store]), tokens.raw.q)
    asking = slice(blocks.regular - KEY_DIGITS - 1, blocks.regular - 1)
    return (read.blocks[:, :, asking] == key_block).any(-1)
