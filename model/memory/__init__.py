"""Segment memories: one file and one line each, here or, for parts of a layer, in layered.PARTS."""

from model.memory.armt import Armt
from model.memory.hmt import Hmt
from model.memory.in_turn import InTurn
from model.memory.landmark import Landmark
from model.memory.layered import Layered
from model.memory.rmt import Rmt

Memory = Layered | InTurn

MEMORIES: dict[str, type[Layered] | type[InTurn]] = {
    "none": Layered,
    "window": Layered,
    "fam": Layered,
    "infini": Layered,
    "abc": Layered,
    "cmab": Layered,
    "composed": Layered,
    "landmark": Landmark,
    "rmt": Rmt,
    "armt": Armt,
    "hmt": Hmt,
}
