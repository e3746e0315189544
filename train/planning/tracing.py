"""Counts the bytes that tensors hold while code runs, and the messages that it sends.

On fake tensors nothing is computed and nothing allocated, and the counts are those of real ones:
every operation passes here, and a storage is counted from the operation that made it until no
tensor holds it any more.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

WORKSPACE = "workspace"


class Message(NamedTuple):
    """One kind of message that a rank takes part in."""

    operation: str  # as c10d names it: send, allreduce_, _allgather_base_, ...
    group: str  # the axis of the mesh
    ranks: int  # of the group
    num_bytes: int  # of the largest tensor that this rank gives or gets


class Held(NamedTuple):
    """Bytes by part, at one moment."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


class Trace(TorchDispatchMode):
    """Counts while it is entered.

    A storage belongs to the part that is named when it is made (`part`), or that it is given to
    (`belongs`); what a message carries belongs to `messages`.
    """

    def __init__(self, groups: dict[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.groups = groups  # axis by process group's name
        self.held: Counter[str] = Counter()
        self.peak = Held({})
        self.messages: Counter[Message] = Counter()
        self.operations = 0
        self._total = self._peak = 0
        self._parts: dict[int, tuple[str, int]] = {}  # of each storage alive
        self._names = [WORKSPACE]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._sent(func, args)
        tensors = list(_tensors(result))
        self.operations += bool(tensors) and not func.is_view
        for tensor in tensors:
            if tensor.device.type != "meta":  # shapes that a library keeps for itself
                self._count(tensor.untyped_storage())
        return result

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name what is made inside."""
        self._names.append(name)
        try:
            yield
        finally:
            self._names.pop()

    def belongs(self, tensors: Iterable[Tensor], name: str) -> None:
        """Count the storages of tensors as a part, new or known."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._count(storage)
            before, size = self._parts[storage._cdata]
            self.held[before] -= size
            self.held[name] += size
            self._parts[storage._cdata] = (name, size)

    def now(self) -> Held:
        """Return what is held at this moment."""
        return Held({name: size for name, size in self.held.items() if size})

    def label_modules(self, model: nn.Module, part_of: Callable[[str], str | None]) -> None:
        """Name what modules make by the modules' names; None: as the module around them."""
        for name, module in model.named_modules():
            part = part_of(name)
            if part is not None:
                forward = module.forward

                def labelled(*args: Any, _f: Any = forward, _p: str = part, **kw: Any) -> Any:
                    with self.part(_p):
                        return _f(*args, **kw)

                module.forward = labelled

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._parts:
            return
        size, name = storage.nbytes(), self._names[-1]
        self._parts[key] = (name, size)
        weakref.finalize(storage, self._forget, key)
        self.held[name] += size
        self._total += size
        if self._total > self._peak:
            self._peak, self.peak = self._total, self.now()

    def _forget(self, key: int) -> None:
        name, size = self._parts.pop(key)
        self.held[name] -= size
        self._total -= size

    def _sent(self, func: Any, args: tuple[Any, ...]) -> None:
        group = next(
            (
                dist.ProcessGroup.unbox(arg)
                for arg in args
                if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
            ),
            None,
        )
        if group is None:  # the end of a wait
            return
        tensors = list(_tensors(args))
        axis = self.groups.get(group.group_name, "world")
        size = max((t.numel() * t.element_size() for t in tensors), default=0)
        self.messages[Message(func._opname, axis, group.size(), size)] += 1
        if axis == "cp":
            self.belongs(tensors, "messages")


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
