"""What a memory is to the decoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, Protocol

from torch import Tensor, nn

from model.config import ModelConfig
from model.interfaces import Linears, Segments

State = Any
"""A layer's carried state: a NamedTuple of tensors, [B, ...] leading; returned, never mutated."""

Initial = Any
"""What a layer's state becomes where a document begins: a NamedTuple of tensors without B."""


class Block(Protocol):
    """What a memory uses of the block it lives in: the layer's own weights."""

    hidden_size: int
    head_dim: int
    num_kv_heads: int  # on this rank

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [all rows, H, K], k and v [all rows, Hkv, K] of rows x, not rotated."""
        ...

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the block's output rows: x [rows, D], attended [all rows, H, K]."""
        ...

    def __call__(self, x: Tensor) -> Any:
        """Return the block's output for memory rows x alone; see Mixer.alone."""
        ...


def detach(state: State) -> State:
    """Return the state cut off from the graph that made it, in storage of its own.

    The only cut there is: the training loop calls it between BPTT windows, no memory ever does.
    """
    return map_tensors(lambda tensor: tensor.detach().clone(), state)


def map_tensors(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Return the state with function applied to every tensor of it, nested ones too."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, list):
        return [map_tensors(function, part) for part in state]
    return type(state)(*(map_tensors(function, part) for part in state))


def named_tensors(state: State, prefix: str) -> dict[str, Tensor]:
    """Return the state's tensors by path: `prefix/0/window/k` is the first layer's window keys."""
    if isinstance(state, Tensor):
        return {prefix: state}
    parts = enumerate(state) if isinstance(state, list) else state._asdict().items()
    found: dict[str, Tensor] = {}
    for name, part in parts:
        found |= named_tensors(part, f"{prefix}/{name}")
    return found


class Mixer(nn.Module):
    """How one block mixes its segments: attention, and what it carries to the next segment."""

    @abstractmethod
    def mix(
        self, block: Block, x: Tensor, segments: Segments, state: State, initial: Initial
    ) -> tuple[Tensor, State]:
        """Return the block's output rows and the state after the last segment.

        x [rows, D] flat over B, N, S. Only the memory chain may run over n; all else is one call.
        """

    @abstractmethod
    def empty(self, block: Block, segments: Segments, like: Tensor) -> State:
        """Return the state of streams that have read nothing (`like`: device and type)."""

    def alone(self, block: Block, x: Tensor) -> Tensor:
        """Return the block's output for memory rows without any token; some memories have it."""
        raise AssertionError(f"{type(self).__name__} has no rows of its own")


class Memory(Protocol):
    """What a whole stack of blocks shares: parameters and the start of a document."""

    slots: int  # rows a layer carries and tokens read as keys; 0 for none

    def __init__(self, config: ModelConfig) -> None: ...

    def mixer(self) -> Mixer:
        """Return the memory's part in one block."""
        ...

    def initial(self, blocks: Items[Block], linears: Linears) -> list[Initial]:
        """Return, for each block, what a document begins with."""
        ...

    def handed_on(self, states: list[State]) -> list[Initial] | None:
        """Return what a document may begin with instead: the first stream's state as it stands.

        None where a memory has no random state passing. (TransformerFAM, section 3.4.)
        """
        ...
