"""Questions read by the model as it lies in its layout, through the training engine."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from model.memory.base import State, map_tensors
from model.memory.hmt import Hmt
from parallel.mesh import Mesh
from parallel.slicing import take_slice
from train.build import Built


class LayoutReader:
    """A Reader (see answers) of all ranks: they make the same calls, in the same order, together.

    Each takes its context-parallel slice of every prompt and has its tensor-parallel part of the
    vocabulary. Data-parallel ranks all do the same work: under ZeRO 3 none of them could read
    without the others' weights, and a few prompts are soon read.
    """

    def __init__(
        self, built: Built, mesh: Mesh, *, step: int, check_stop: Callable[[], None]
    ) -> None:
        """step: of training; check_stop: called before each call of the model; may raise."""
        self.built, self.mesh, self.step, self.check_stop = built, mesh, step, check_stop

    def read(self, tokens: Tensor, state: State | None) -> State:
        """Return this rank's state after a segment."""
        return self._run(tokens, state, torch.zeros_like(tokens, dtype=torch.bool))[1]

    def logits(self, tokens: Tensor, state: State | None, wanted: Tensor) -> Tensor:
        """Return the logits [W, V] of the places wanted, the same float32 on all ranks' CPUs."""
        here = self._run(tokens, state, wanted)[0].float()
        numbers = (wanted.flatten().cumsum(0) - 1).view(wanted.shape)
        mine = self._slice(numbers)[self._slice(wanted)].to(here.device)
        found = here.new_zeros(int(wanted.sum()), here.shape[1]).index_copy_(0, mine, here)
        if self.mesh.cp > 1:
            dist.all_reduce(found, group=self.mesh.cp_group)  # each place is one rank's alone
        if self.mesh.tp > 1:
            parts = [torch.empty_like(found) for _ in range(self.mesh.tp)]
            dist.all_gather(parts, found, group=self.mesh.tp_group)
            found = torch.cat(parts, 1)
        return found[:, : self.built.model.config.vocab_size].cpu()

    def _run(self, tokens: Tensor, state: State | None, wanted: Tensor) -> tuple[Tensor, State]:
        """Return this rank's logits of its places among wanted, and the streams' states."""
        self.check_stop()
        streams, device = len(tokens), self.mesh.device
        unit = self._unit(tokens.shape[2])
        rows = torch.arange(-(-streams // unit) * unit)
        extra = rows >= streams
        rows %= streams
        if extra.any():
            tokens, wanted = tokens[rows], wanted[rows] & ~extra[:, None, None]
            if state is not None:
                state = map_tensors(lambda x: x.index_select(0, rows.to(x.device)), state)
        here, places = (self._slice(x).to(device) for x in (tokens, wanted))
        starts = torch.zeros(here.shape[:2], dtype=torch.bool, device=device)
        logits, after = self.built.engine(here, starts, state, wanted=places, step=self.step)
        if extra.any():
            after = map_tensors(lambda x: x[:streams], after)
        return logits, after

    def _slice(self, x: Tensor) -> Tensor:
        return take_slice(x, self.built.layout, self.mesh.cp_rank)

    def _unit(self, segment_len: int) -> int:
        """Return what streams of a call come in multiples of: its rows are scattered evenly."""
        ranks = self.built.model.linears.scattered
        rows = segment_len // self.mesh.cp  # of a stream
        return math.lcm(scattered_lanes(self.built), ranks // math.gcd(ranks, rows))


def scattered_lanes(built: Built) -> int:
    """Return what lanes come in multiples of: sequence parallelism cuts hmt's rows evenly then."""
    return built.model.linears.scattered if isinstance(built.model.memory, Hmt) else 1
