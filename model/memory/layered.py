"""Memories inside the layers: any number of parts side by side, and the window."""

from __future__ import annotations

from collections.abc import Sequence as Items

from torch import nn

from model.config import ComposedMemory, ModelConfig, PartConfig
from model.interfaces import Linears
from model.kernels import Kernel
from model.memory.base import Block, Carried, Initial, PartMemory
from model.memory.fam import Fam
from model.memory.infini import Infini
from model.memory.mixer import Mixer
from model.memory.slots import Abc, Cmab

PARTS: dict[str, type[PartMemory]] = {
    "fam": Fam,
    "infini": Infini,
    "abc": Abc,
    "cmab": Cmab,
}


class Layered(nn.Module):
    """None, window, and every memory made of parts: all segments go through a layer at once."""

    in_turn = False
    packs = True  # segments may hold several documents (Segments.packed)

    @property
    def weighted(self) -> bool:
        """Whether a segment can stand for several like it (Segments.weights)."""
        return bool(self.parts) and all(part.weighted for part in self._parts().values())

    kernel: Kernel | None = None  # of token keys, where it is not plain softmax

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(self.made_of(config))

    def made_of(self, config: ModelConfig) -> dict[str, PartMemory]:
        """Return the memory's parts by name."""
        memory = config.memory
        parts: tuple[PartConfig, ...] = ()
        if isinstance(memory, ComposedMemory):
            parts = memory.parts
        elif isinstance(memory, PartConfig):
            parts = (memory,)
        return {part.name: PARTS[part.name](config, part) for part in parts}

    def mixer(self, config: ModelConfig, linears: Linears, layer: int) -> Mixer:
        """Return the memory of one block; layer 0 is the lowest."""
        parts = {name: part.part(config, linears) for name, part in self._parts().items()}
        return Mixer(parts, config, self.kernel)

    def initial(self, blocks: Items[Block], linears: Linears) -> list[dict[str, Initial]]:
        """Return, for each block, what a document begins with in each part."""
        found = {name: part.initial(blocks, linears) for name, part in self._parts().items()}
        return [{name: part[i] for name, part in found.items()} for i in range(len(blocks))]

    def handed_on(self, carried: Carried) -> list[dict[str, Initial]] | None:
        """Return what a document may begin with instead, of the parts that have it."""
        found = {}
        for name, part in self._parts().items():
            states = [layer.parts[name] for layer in carried.layers if name in layer.parts]
            passed = part.handed_on(states)
            if passed is not None:
                found[name] = passed
        if not found:
            return None
        return [{name: part[i] for name, part in found.items()} for i in range(len(carried.layers))]

    def _parts(self) -> dict[str, PartMemory]:
        return {name: part for name, part in self.parts.items() if isinstance(part, PartMemory)}
