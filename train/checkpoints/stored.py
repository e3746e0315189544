"""What a checkpoint holds, read at any layout, whatever layout wrote it.

Names in its files say what a tensor is and where it belongs:

    master/blocks.0.qkv.linear.weight@4096    elements from 4096 on of a flattened TP part
    memory/layers/0/window/k@2                streams from lane 2 on
    passed/0/fam/slots, random/cpu            random state passing; a rank's own generator

Only the asked-for slices are read, so no rank ever holds much more than its own share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from model.memory.base import (
    Axes,
    State,
    join_rows,
    map_tensors,
    named_axes,
    named_parts,
    take_rows,
)
from parallel.mesh import place
from parallel.slicing import join_tokens, layout_of, take_slice
from parallel.tensor import Cut
from train.checkpoints.folder import BadCheckpoint, Manifest

MASTER = "master"
_STRIP = 1 << 24  # elements of a matrix that are cut anew at once: 64 MiB


class Place(NamedTuple):
    """Where a rank stands, as far as it decides what it holds."""

    tp: int
    tp_rank: int
    cp: int
    cp_rank: int
    layout: str  # parallel.layout


class Part(NamedTuple):
    """Elements of what a tensor-parallel rank holds of a parameter."""

    cut: Cut
    tp: int
    tp_rank: int
    span: slice  # of the part, flat


class _Fragment(NamedTuple):
    start: int
    numel: int
    file: int
    key: str


class Stored:
    """The tensors of one checkpoint."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self.checkpoint, self.manifest = checkpoint, manifest
        self.tp, self.cp = manifest.layout["tp"], manifest.layout["cp"]
        self.layout: str = manifest.config.get("parallel", {}).get("layout", "zigzag")
        # (kind, parameter) -> TP rank -> fragments; path -> first lane -> (TP, CP rank) -> file
        self._fragments: dict[tuple[str, str], dict[int, list[_Fragment]]] = {}
        self._memory: dict[str, dict[int, dict[tuple[int, int], int]]] = {}
        self._others: dict[str, list[int]] = {}  # key -> files that hold it
        self._open = lru_cache(maxsize=64)(self._open_file)
        for number in range(len(manifest.files)):
            self._index(number)

    # weights and moments

    def has(self, kind: str, name: str) -> bool:
        """Return whether anything of a parameter is here; kind: master, exp_avg, exp_avg_sq."""
        return (kind, name) in self._fragments

    def whole_shape(self, name: str) -> torch.Size:
        """Return the shape of a parameter over all tensor-parallel ranks."""
        entry = self.manifest.parameters[name]
        return self._cut(name).whole_shape(torch.Size(entry["shape"]), self.tp)

    def whole(self, name: str, kind: str = MASTER) -> Tensor:
        """Return a parameter joined from all ranks' fragments, float32."""
        shape = self.whole_shape(name)
        part = Part(Cut(None, 1), 1, 0, slice(0, shape.numel()))
        return self.part(kind, name, part).view(shape)

    def part(self, kind: str, name: str, wanted: Part) -> Tensor:
        """Return some elements of a tensor-parallel part of a parameter, flat.

        Raises BadCheckpoint where an element is missing.
        """
        cut, numel = self._cut(name), self.whole_shape(name).numel()
        if self.tp == 1:  # then nothing was cut, whatever can be
            cut = wanted.cut
        tp, tp_rank, start, stop = wanted.tp, wanted.tp_rank, wanted.span.start, wanted.span.stop
        if cut.dim is None or tp == self.tp:
            return self._interval(kind, name, tp_rank % self.tp, start, stop)
        # A part is some columns of a matrix: rows are what lies before the cut dimension.
        rows = cut.stride * self.whole_shape(name)[: cut.dim].numel()
        width = numel // rows // tp
        found = torch.empty(stop - start)
        at = start
        while at < stop:
            row, column = divmod(at, width)
            count = min(_STRIP // width, (stop - at) // width) if column == 0 else 0
            # Whole rows by the strip; of a row that is asked for in part, or very long, a piece.
            size = count * width if count > 1 else min(width - column, stop - at, _STRIP)
            first = tp_rank * width + column
            strip = slice(row, row + max(count, 1))
            columns = slice(first, first + size // max(count, 1))
            found[at - start : at - start + size] = self._columns(
                kind, name, strip, columns, numel // rows // self.tp
            )
            at += size
        return found

    def _columns(self, kind: str, name: str, rows: slice, columns: slice, width: int) -> Tensor:
        """Return some columns of some rows, flat, out of parts of so many columns each."""
        pieces, count = [], rows.stop - rows.start
        for tp_rank in range(columns.start // width, -(-columns.stop // width)):
            first = max(columns.start - tp_rank * width, 0)
            last = min(columns.stop - tp_rank * width, width)
            begin = rows.start * width
            if count == 1:
                flat = self._interval(kind, name, tp_rank, begin + first, begin + last)
                pieces.append(flat.unsqueeze(0))
            else:
                flat = self._interval(kind, name, tp_rank, begin, rows.stop * width)
                pieces.append(flat.view(count, width)[:, first:last])
        return torch.cat(pieces, 1).flatten()

    def _interval(self, kind: str, name: str, tp_rank: int, start: int, stop: int) -> Tensor:
        """Return elements of a flattened part as it was saved."""
        found, covered = torch.empty(stop - start), 0
        for fragment in self._fragments.get((kind, name), {}).get(tp_rank, []):
            first = max(start, fragment.start)
            last = min(stop, fragment.start + fragment.numel)
            if first < last:
                values = self._open(fragment.file).get_slice(fragment.key)
                found[first - start : last - start] = values[
                    first - fragment.start : last - fragment.start
                ]
                covered += last - first
        if covered != stop - start:
            raise BadCheckpoint(
                f"{self.checkpoint}: {kind}/{name} has {covered} of the {stop - start} elements"
                f" from {start} on of TP rank {tp_rank}"
            )
        return found

    def _cut(self, name: str) -> Cut:
        entry = self.manifest.parameters[name]
        return Cut(entry["dim"], entry["stride"])

    # memory and the rest

    @property
    def has_memory(self) -> bool:
        """Whether streams had read anything."""
        return bool(self._memory)

    def memory(self, template: State, lanes: range, here: Place) -> State:
        """Return the state of some lanes as a rank at `here` holds it, shaped as template.

        Raises BadCheckpoint where the checkpoint has no such state: another memory's.
        """
        axes = named_axes(template, "memory")
        groups = sorted(self._groups())
        parts = []
        for first, count in groups:
            rows = slice(max(lanes.start - first, 0), min(lanes.stop - first, count))
            if rows.start < rows.stop:
                state = _filled(
                    template,
                    "memory",
                    lambda path, lane=first: self._joined(path, lane, axes[path], here),
                )
                parts.append(take_rows(state, rows))
        if not parts:
            raise BadCheckpoint(f"{self.checkpoint}: no memory of lanes {lanes.start} and after")
        return map_tensors(_owned, join_rows(parts))

    def passed(self, template: State) -> State | None:
        """Return what random state passing may begin a document with, if anything."""
        if not any(name.startswith("passed/") for name in self._others):
            return None
        return map_tensors(_owned, _filled(template, "passed", self._any))

    def random(self, kind: str, rank: int) -> Tensor | None:
        """Return the state of a rank's generator (kind: cpu, cuda): its own, or another's."""
        files = self._others.get(f"random/{kind}")
        if not files:
            return None
        return self._tensor(files[rank % len(files)], f"random/{kind}")

    def _joined(self, path: str, lane: int, axes: Axes, here: Place) -> Tensor:
        """Return a tensor of the lanes saved together from `lane` on, cut as at `here`."""
        if path not in self._memory:
            raise BadCheckpoint(f"{self.checkpoint}: no {path}; it was saved with another memory")
        files = self._memory[path][lane]
        # What is cut alike there and here is read from its own rank alone.
        own_heads = here.tp == self.tp
        own_tokens = here.cp == self.cp and here.layout == self.layout
        heads: Iterable[int] = [0]
        if axes.heads is not None:
            heads = [here.tp_rank] if own_heads else range(self.tp)
        tokens: Sequence[int] = [0]
        if axes.tokens is not None:
            tokens = [here.cp_rank] if own_tokens else range(self.cp)
        slices = []
        for cp_rank in tokens:
            parts = [self._tensor(files[tp_rank, cp_rank], f"{path}@{lane}") for tp_rank in heads]
            slices.append(parts[0] if axes.heads is None else torch.cat(parts, axes.heads))
        found = slices[0]
        if axes.tokens is not None and not own_tokens:
            whole = join_tokens(slices, layout_of(self.layout, self.cp), axes.tokens)
            found = take_slice(whole, layout_of(here.layout, here.cp), here.cp_rank, axes.tokens)
        if axes.heads is not None and not own_heads:
            found = found.chunk(here.tp, axes.heads)[here.tp_rank].contiguous()
        return found

    def _groups(self) -> Iterable[tuple[int, int]]:
        """Yield (first lane, lanes) of what was saved together."""
        for path, lanes in self._memory.items():
            for lane, files in lanes.items():
                file = next(iter(files.values()))
                yield lane, self._open(file).get_slice(f"{path}@{lane}").get_shape()[0]
            return

    def _any(self, name: str) -> Tensor:
        if name not in self._others:
            raise BadCheckpoint(f"{self.checkpoint}: no {name}; it was saved with another memory")
        return self._tensor(self._others[name][0], name)

    # files

    def _index(self, number: int) -> None:
        tp_rank, cp_rank, _ = place(number, tp=self.tp, cp=self.cp)
        with self._open_file(number) as file:
            for key in file.keys():
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("@")
                if kind == "memory":
                    lanes = self._memory.setdefault(f"memory/{name}", {})
                    lanes.setdefault(int(start), {})[tp_rank, cp_rank] = number
                elif name:
                    numel = file.get_slice(key).get_shape()[0]
                    parts = self._fragments.setdefault((kind, name), {})
                    fragment = _Fragment(int(start), numel, number, key)
                    parts.setdefault(tp_rank, []).append(fragment)
                else:
                    self._others.setdefault(key, []).append(number)

    def _open_file(self, number: int) -> Any:
        return safe_open(self.checkpoint / f"rank-{number:05d}.safetensors", framework="pt")

    def _tensor(self, file: int, key: str) -> Tensor:
        tensor: Tensor = self._open(file).get_tensor(key)
        return tensor


def _owned(x: Tensor) -> Tensor:
    """Return x in memory that torch has aligned.

    Of a file it lies as the file has it, and some CPUs' matrix products round by that.
    """
    return x.clone(memory_format=torch.contiguous_format)


def _filled(template: State, prefix: str, get: Any) -> State:
    """Return a state shaped as the template from get(path), on the template's devices."""
    if isinstance(template, Tensor):
        # Another type where train.precision was changed; some memories keep a part on the host.
        return get(prefix).to(template.device, template.dtype)
    filled = {n: _filled(part, f"{prefix}/{n}", get) for n, part in named_parts(template)}
    if isinstance(template, dict):
        return filled
    values = filled.values()
    return list(values) if isinstance(template, list) else type(template)(*values)
