"""What a memory is to the decoder.

Two kinds. A *part* lives inside a layer and adds to its attention: keys that tokens read, or a read
blended with what attention gave; what it carries depends on its own layer only, so all segments of
a forward pass go through a layer at once (fam, infini, abc, cmab, and the window). A memory that
goes *in turn* hands rows from segment to segment through the whole stack, so segments go through it
one by one (rmt, armt, hmt).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from typing import Any, NamedTuple, Protocol, get_type_hints

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.fold import Piece
from model.interfaces import Linears, Segments

State = Any
"""What is carried: tensors [B, ...] in NamedTuples, lists and dicts; returned, never mutated (a
store of blocks fills room that no state shows)."""

Initial = Any
"""What a layer's state becomes where a document begins: a NamedTuple of tensors without B."""

Opened = Any
"""What tokens read of a part: a NamedTuple of tensors, [B, ...] or, for N segments, [B, N, ...]."""


class Axes(NamedTuple):
    """Which dimensions of a state's tensor are cut over ranks, as `Annotated` beside its shape.

    A tensor without is the same on all ranks of a data-parallel place.
    """

    heads: int | None = None  # over tensor-parallel ranks, in order
    tokens: int | None = None  # over context-parallel ranks, by the sequence's layout


class Carried(NamedTuple):
    """Everything a decoder carries from one forward pass to the next."""

    layers: list[State]
    stack: State  # of the memory as a whole; [] where it has none


class Projected(NamedTuple):
    """The layer's maps of some rows, not rotated; heads of this rank."""

    q: Tensor  # [all rows, H, K]
    k: Tensor  # [all rows, Hkv, K]
    v: Tensor
    extra: Tensor  # [all rows, Hkv, E]: what the layer's memory asked for


class Block(Protocol):
    """What a memory uses of the block it lives in: the layer's own weights."""

    hidden_size: int
    head_dim: int
    num_heads: int  # on this rank
    num_kv_heads: int

    def project(self, x: Tensor) -> Projected:
        """Return queries, keys and values of rows x, not rotated."""
        ...

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the block's output rows: x [rows, D], attended [all rows, H, K]."""
        ...

    def __call__(self, x: Tensor) -> Any:
        """Return the block's output for memory rows x, which read only one another."""
        ...


class Tokens(NamedTuple):
    """A block's queries, and its keys with those of the past before them."""

    q: Tensor  # [B, N, S, H, K], rotated
    k: Tensor  # [B, M + N, S, Hkv, K], rotated
    v: Tensor
    visible: Tensor | None  # [B, N, M] bool
    raw: Projected  # of the N segments alone: [B, N, S, ...]
    raw_k: Tensor  # [B, M + N, S, Hkv, K], not rotated
    age: Tensor  # [B, N] int64: earlier segments of each one's document

    def segment(self, n: int) -> tuple[Tensor, Tensor]:
        """Return the rotated keys and the values of segment n: [B, S, Hkv, K]."""
        here = n - self.q.shape[1]
        return self.k[:, here], self.v[:, here]


def detach(state: State) -> State:
    """Return the state cut off from the graph that made it, in storage of its own.

    The only cut there is: the training loop calls it between BPTT windows, no memory ever does.
    A state that is more than tensors side by side has a `detach` of its own, and may share storage
    in which no value changes.
    """
    return map_tensors(lambda tensor: tensor.detach().clone(), state, own="detach")


def compact(state: State) -> State:
    """Return the state without what nobody reads: to save or look at it; views.

    A state with room for more than it holds has a `compact` of its own.
    """
    return map_tensors(lambda tensor: tensor, state, own="compact")


def map_tensors(
    function: Callable[[Tensor], Tensor], state: State, own: str | None = None
) -> State:
    """Return the state with function applied to every tensor of it, nested ones too.

    own: the method that does instead for the states that have one of this name.
    """
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, list):
        return [map_tensors(function, part, own) for part in state]
    if isinstance(state, dict):
        return {name: map_tensors(function, part, own) for name, part in state.items()}
    if own is not None and hasattr(state, own):
        return getattr(state, own)()
    return type(state)(*(map_tensors(function, part, own) for part in state))


def named_tensors(state: State, prefix: str) -> dict[str, Tensor]:
    """Return the state's tensors by path: `prefix/layers/0/window/k` is the first layer's keys."""
    if isinstance(state, Tensor):
        return {prefix: state}
    found: dict[str, Tensor] = {}
    for name, part in named_parts(state):
        found |= named_tensors(part, f"{prefix}/{name}")
    return found


def named_axes(state: State, prefix: str) -> dict[str, Axes]:
    """Return how each of the state's tensors is cut over ranks, by the paths of `named_tensors`."""
    if isinstance(state, Tensor):
        return {prefix: Axes()}
    hints = {}
    if not isinstance(state, list | dict):
        hints = get_type_hints(type(state), include_extras=True)
    found: dict[str, Axes] = {}
    for name, part in named_parts(state):
        marks = getattr(hints.get(name), "__metadata__", ())
        axes = next((mark for mark in marks if isinstance(mark, Axes)), None)
        path = f"{prefix}/{name}"
        found |= named_axes(part, path) if axes is None else {path: axes}
    return found


def take_rows(state: State, rows: slice) -> State:
    """Return the state of some of its streams."""
    return map_tensors(lambda tensor: tensor[rows], state)


def join_rows(states: Items[State]) -> State:
    """Return the state of all streams of several states, one after the other.

    A state that is more than tensors side by side has a `join_rows` of its own.
    """
    first = states[0]
    if len(states) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    own = getattr(type(first), "join_rows", None)
    if own is not None:
        return own(states)
    if isinstance(first, dict):
        return {name: join_rows([state[name] for state in states]) for name in first}
    parts = [join_rows(part) for part in zip(*states, strict=True)]
    return parts if isinstance(first, list) else type(first)(*parts)


def named_parts(state: State) -> Iterable[tuple[Any, State]]:
    """Return what a state is made of, one level down: (name or index, part)."""
    if isinstance(state, list):
        return enumerate(state)
    if isinstance(state, dict):
        return state.items()
    fields: dict[str, State] = state._asdict()
    return fields.items()


def stack_segments(items: Items[Opened]) -> Opened:
    """Return one NamedTuple of [B, N, ...] from N of [B, ...]."""
    return type(items[0])(*(torch.stack(parts, 1) for parts in zip(*items, strict=True)))


class Part(nn.Module):
    """One memory inside one layer."""

    extra = 0  # features it wants of each key head's projection (Projected.extra)

    @abstractmethod
    def empty(self, block: Block, segments: Segments, like: Tensor) -> State:
        """Return the state of streams that have read nothing (`like`: device and type)."""

    @abstractmethod
    def open(
        self, block: Block, segments: Segments, n: int, state: State, initial: Initial
    ) -> tuple[Opened, Any]:
        """Return what tokens of segment n read, and what else `close` needs of it.

        The state is what segment n - 1 left: where n starts a document, it is reset here.
        """

    @abstractmethod
    def close(
        self, block: Block, segments: Segments, n: int, opened: Opened, rest: Any, tokens: Tokens
    ) -> State:
        """Return the state after segment n, whose tokens are known now."""

    def chain(
        self, block: Block, segments: Segments, tokens: Tokens, state: State, initial: Initial
    ) -> tuple[Opened, State]:
        """Return what tokens of each segment read, [B, N, ...], and the state after the last.

        One segment after the other; parts that can join all at once do so here.
        """
        found = []
        for n in range(segments.num_segments):
            opened, rest = self.open(block, segments, n, state, initial)
            state = self.close(block, segments, n, opened, rest, tokens)
            found.append(opened)
        return stack_segments(found), state

    def begin(self, block: Block, segments: Segments, state: State, initial: Initial) -> Opened:
        """Return what tokens read of a document that begins in each segment: [B, N, ...].

        For packed segments, whose later documents read what they would at a segment's start.
        """
        begun = segments._replace(starts=torch.ones_like(segments.starts))
        return stack_segments(
            [self.open(block, begun, n, state, initial)[0] for n in range(segments.num_segments)]
        )

    def piece(self, segments: Segments, opened: Opened) -> Piece | None:
        """Return the keys that tokens read beside their own, if the part has any."""
        return None

    def other(self, segments: Segments, opened: Opened, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what tokens read beside all keys, out [B, N, S, H, K] and lse [B, N, H, S].

        q: the tokens' queries [B, N, S, H, K], not rotated.
        """
        return None

    def blend(self, q: Tensor, opened: Opened, attended: Tensor) -> Tensor:
        """Return the attention's result with the part's read in it; all [B, N, S, H, K].

        q: the tokens' queries, not rotated.
        """
        return attended


class PartMemory(nn.Module):
    """What one kind of part shares over the layers: parameters and the start of a document."""

    weighted = False  # whether what it writes can be counted several times (Segments.weights)

    @abstractmethod
    def part(self, config: ModelConfig, linears: Linears) -> Part:
        """Return the memory's part in one block."""

    def initial(self, blocks: Items[Block], linears: Linears) -> list[Initial]:
        """Return, for each block, what a document begins with; [] where it is nothing."""
        return [[] for _ in blocks]

    def handed_on(self, states: list[State]) -> list[Initial] | None:
        """Return what a document may begin with instead: the first stream's state as it stands.

        None where a memory has no random state passing. (TransformerFAM, section 3.4.)
        """
        return None
