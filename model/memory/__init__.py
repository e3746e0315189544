"""Segment memories: one file and one line here each."""

from model.memory.base import Memory
from model.memory.fam import Fam
from model.memory.window import Window

MEMORIES: dict[str, type[Memory]] = {
    "none": Window,
    "window": Window,
    "fam": Fam,
}
