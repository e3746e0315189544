"""How a rank takes memory from the system.

A step frees what it made in another order than it made it. Told nothing, glibc keeps the holes
between what is left (at 16k tokens and block checkpointing 0.9 of 2.5 GiB), and takes anew, zeroed
page by page, what it gave back a moment ago. The loader of documents runs at a third of its speed
for that, or at all of it, as its arrays happen to lie.
"""

from __future__ import annotations

import ctypes
import os

# Names and numbers of malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MIB = 1 << 20
SETTINGS = {
    # From here on an allocation is a mapping of its own, which leaves no hole.
    _MMAP_THRESHOLD: 4 * _MIB,
    # What is smaller comes from a heap that grows and shrinks in large steps only.
    _TOP_PAD: 64 * _MIB,
    _TRIM_THRESHOLD: 256 * _MIB,
}


TIGHT = SETTINGS | {_MMAP_THRESHOLD: 1 * _MIB}
"""Hardly a hole is left, and a mapping made for each tensor of a chunk takes time."""


def settle_heap(*, tight: bool = False) -> None:
    """Keep holes out of the heap, and use huge pages; call it before the first tensor is made.

    tight: memory comes before time.
    Nothing is changed where the environment says how (MALLOC_*, THP_MEM_ALLOC_ENABLE), and only
    glibc is spoken to.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first tensor
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for number, value in (TIGHT if tight else SETTINGS).items():
            libc.mallopt(number, value)
