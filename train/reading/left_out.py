"""What data.on_damage=skip left out of the training data, on any rank: each told once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from train.agree import of_all
from train.reading.corpora import Training

_SHOWN = 3
"""Of what was found at one time, in the text; events.jsonl has them all."""


class LeftOut:
    """Hears of damage that this rank's reading met, and tells all ranks."""

    def __init__(self, training: Training, device: torch.device) -> None:
        self._training, self._device = training, device
        self._known: set[str] = set()  # of any rank's

    def news(self) -> list[str]:
        """Return what was left out since the last call, the same on all ranks.

        They call it together. Ranks that read the same document find the same: it is told once.
        """
        # Not by their number: a mixture's are one corpus's behind another's.
        own = [text for text in self._training.damage if text not in self._known]
        most = torch.tensor(len(own), device=self._device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        if not most.item():
            return []
        new = dict.fromkeys(text for texts in of_all(own) for text in texts)
        self._known.update(new)
        return list(new)

    @property
    def count(self) -> int:
        """Return how many documents and files all ranks were told of."""
        return len(self._known)


def describe(texts: Sequence[str], step: int) -> str:
    """Return a line: how many, and the first of them."""
    more = f"; and {len(texts) - _SHOWN:,} more" if len(texts) > _SHOWN else ""
    when = f"step {step}: " if step else ""
    return f"{when}{len(texts):,} left out as damaged: {'; '.join(texts[:_SHOWN])}{more}"
