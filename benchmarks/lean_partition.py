"""How full a GPU is while it decodes, by how contexts are cut: one markdown table, simulated.

Run from the repository root: python benchmarks/lean_partition.py
No kernel runs: a tile of keys is one unit of time and merging costs nothing. Work units start in
order, each on the worker that is free first, as a GPU starts thread blocks. Utilisation is
tiles / (workers * time of the last worker).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence

from parallel.decode import lean_partition

WORKERS = 132  # SMs of an H100 or H200
TILE = 128  # keys, for heads of 128 (LeanAttention)
KEY_HEADS = 8  # of an 8B Llama; the query heads of each run together
SPLITS = [1, 2, 4, 8, 16, 32, 64, 128]


def batches() -> dict[str, list[int]]:
    """Return the length of each stream, by what the batch is."""
    draw = random.Random(0)

    def ragged(count: int, shortest: int, longest: int) -> list[int]:
        low, high = shortest.bit_length() - 1, longest.bit_length() - 1
        return [int(2 ** draw.uniform(low, high)) for _ in range(count)]

    return {
        "1 x 64k": [1 << 16],
        "1 x 512k": [1 << 19],
        "16 x 32k": [1 << 15] * 16,
        "17 x 32k": [1 << 15] * 17,
        "4 of 1k to 256k": ragged(4, 1 << 10, 1 << 18),
        "16 of 1k to 256k": ragged(16, 1 << 10, 1 << 18),
        "64 of 1k to 256k": ragged(64, 1 << 10, 1 << 18),
        "1 x 512k + 63 x 2k": [1 << 19] + [1 << 11] * 63,
        "64 of 256 to 2k": ragged(64, 1 << 8, 1 << 11),
    }


def tiles_of(streams: Sequence[int]) -> list[int]:
    """Return the number of tiles of each stream's key heads."""
    return [-(-length // TILE) for length in streams for _ in range(KEY_HEADS)]


def time_of(units: Sequence[int]) -> int:
    """Return when the last worker ends; units: tiles of each work unit, in the order they start."""
    free = [0] * WORKERS
    for unit in units:
        heapq.heapreplace(free, free[0] + unit)
    return max(free)


def split(tiles: Sequence[int], parts: int) -> list[int]:
    """Return work units: each head's tiles in `parts` pieces of one size, the last ones shorter."""
    units = []
    for count in tiles:
        size = -(-count // parts)
        units += [min(size, count - first) for first in range(0, count, size)]
    return units


def lean(streams: Sequence[int]) -> tuple[int, int]:
    """Return (time, partial results) of the lean partition."""
    lengths = [length for length in streams for _ in range(KEY_HEADS)]
    stretches = lean_partition(lengths, TILE, WORKERS)
    ends, total = set(), 0
    for count in tiles_of(streams):
        total += count
        ends.add(total)
    cuts = {stretch.start for stretch in stretches if stretch} - ends - {0}
    return max(len(stretch) for stretch in stretches), len(lengths) + len(cuts)


def row(name: str, streams: Sequence[int]) -> str:
    """Return one row of the table: utilisations, and the partial results that are to be merged."""
    tiles = tiles_of(streams)

    def used(time: int) -> float:
        return sum(tiles) / (WORKERS * time)

    splits = {parts: split(tiles, parts) for parts in SPLITS}
    fullest = {parts: used(time_of(units)) for parts, units in splits.items()}
    best = max(SPLITS, key=lambda parts: fullest[parts])
    time, partial = lean(streams)
    cells = [
        name,
        str(sum(tiles)),
        f"{fullest[1]:.2f}",
        f"{fullest[8]:.2f} ({len(splits[8])})",
        f"{fullest[best]:.2f} ({best}: {len(splits[best])})",
        f"{used(time):.2f} ({partial})",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    print(
        "| streams | tiles | one block a head | 8 splits (parts) | best split (splits: parts) |"
        " lean (parts) |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, streams in batches().items():
        print(row(name, streams))


if __name__ == "__main__":
    main()
